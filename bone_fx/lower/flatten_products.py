"""Lets products that a model computes on flattened tokens see the tokens as they come.

Before (HF `Conv1D`):
    flat:    [B*S, I] = view(x)
    product: [B*S, O] = addmm(bias, flat, weight [I, O])
    y:       [B, S, O] = view(product)

After:
    y:       [B, S, O] = linear(x, t(weight), bias)

Only where the second view brings back the sizes that the first one joined.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.lower.cancel_reshapes import VIEWS
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def flatten_products(graph: Graph) -> Outcome:
    """Replaces addmm between two views by a linear on the tensor before the first."""
    changed = False
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default, sort=True):
        users = list(node.users)
        parts = _parts(node)
        if parts is None or len(users) != 1:
            continue
        x, weight, bias = parts
        (back,) = users
        if back.target not in VIEWS or not _restores(back, x, node):
            continue
        with graph.inserting_before(back):
            transposed = graph.call_function(aten.t.default, (weight,))
            linear = graph.call_function(aten.linear.default, (x, transposed, bias))
        transposed.meta = {**weight.meta, "val": weight.meta["val"].t()}
        linear.meta = dict(back.meta)
        back.replace_all_uses_with(linear)
        graph.erase_node(back)
        graph.erase_node(node)
        changed = True
    return Outcome(modified=changed)


def _parts(node: Node) -> tuple[Node, Node, Node] | None:
    """What a product of flattened tokens is made of: the tokens, the weight and the bias."""
    bias, flat, weight = node.args
    if node.kwargs or not isinstance(flat, Node) or flat.target not in VIEWS:
        return None
    x = flat.args[0]
    if not isinstance(x, Node) or not isinstance(weight, Node) or not isinstance(bias, Node):
        return None
    before, after = x.meta["val"].shape, flat.meta["val"].shape
    one_bias = bias.meta["val"].dim() == 1
    return (x, weight, bias) if one_bias and len(before) > 2 and before[-1] == after[-1] else None


def _restores(back: Node, x: Node, product: Node) -> bool:
    sizes, expected = back.meta["val"].shape, x.meta["val"].shape
    return bool(
        len(sizes) == len(expected)
        and all(str(a) == str(b) for a, b in zip(sizes[:-1], expected[:-1], strict=True))
        and sizes[-1] == product.meta["val"].shape[-1]
    )
