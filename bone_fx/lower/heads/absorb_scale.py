"""Moves a number that queries are multiplied with into the attention operator.

Before (opt):
    scaled: [B, S, H*D] = mul(q, 0.25)
    GroupQueryAttention(scaled, k, v, …, scale=1.0)

After:
    GroupQueryAttention(q, k, v, …, scale=0.25)

The scores are linear in the queries, and so is a rotary embedding inside the operator. Keys stay as
they are, since the operator hands them out as the cache. A factor that makes the scale 0 or
negative stays: the operator takes 0 for none.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.lower.symbolic import CONTRIB, attributes, is_operator, operands, rewrite
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def absorb_scale(graph: Graph) -> Outcome:
    """Multiplies the scale of each GroupQueryAttention by the factor of its queries."""
    changed = 0
    for node in list(graph.nodes):
        while is_operator(node, CONTRIB, "GroupQueryAttention") and _absorb(node):
            changed += 1
    return Outcome(modified=changed > 0)


def _absorb(attention: Node) -> bool:
    query, *others = operands(attention)
    values = {k: v for k, v in attributes(attention).items() if isinstance(v, int | float)}
    scale = values.get("scale")
    if query is None or not isinstance(scale, float) or query.target is not aten.mul.Tensor:
        return False
    source, factor = query.args
    if not isinstance(source, Node) or not isinstance(factor, int | float) or len(query.users) > 1:
        return False
    same = source.meta["val"].dtype == query.meta["val"].dtype
    if not same or scale * factor <= 0:
        return False
    rewrite(attention, [source, *others], {**values, "scale": scale * float(factor)})
    attention.graph.erase_node(query)
    return True
