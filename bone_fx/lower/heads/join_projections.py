"""One product for queries, keys and values that norms keep apart.

Before (qwen3; a norm of each head stands between q or k and the operator):
    q:  [B, S, H*D] = linear(x, w_q)
    k:  [B, S, K*D] = linear(x, w_k)
    v:  [B, S, K*D] = linear(x, w_v)
    GroupQueryAttention(reshape(norm(reshape(q))), reshape(norm(reshape(k))), v, …)

After:
    qkv:     [B, S, (H+2*K)*D] = linear(x, cat(w_q, w_k, w_v))
    q, k, v: split(qkv, [H*D, K*D, K*D], 2)

What the operator takes packed is `pack_projections`' part, which comes first.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from bone_fx.lower.heads.move_norms import is_row_norm
from bone_fx.lower.heads.pack_projections import joined
from bone_fx.lower.symbolic import CONTRIB, SINGLE, is_operator, operands
from bone_fx.passes.frame import PassResult, copy_module, graph_pass

aten = torch.ops.aten
MOVES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int}


@graph_pass
def join_projections(gm: GraphModule) -> PassResult:
    """Computes the three projections of each GroupQueryAttention at once, and splits them."""
    copied = copy_module(gm)
    changed = 0
    for node in list(copied.graph.nodes):
        if is_operator(node, CONTRIB, "GroupQueryAttention"):
            changed += _join(copied.graph, [_product_behind(part) for part in operands(node)[:3]])
    copied.graph.eliminate_dead_code()
    return PassResult(copied if changed else gm, modified=changed > 0)


def _product_behind(node: Node | None) -> Node | None:
    """The projection that norms, reshapes and a rotary embedding lead back to."""
    while node is not None and (
        node.target in MOVES or is_row_norm(node) or is_operator(node, CONTRIB, "RotaryEmbedding")
    ):
        node = operands(node)[0] if node.target is SINGLE else node.all_input_nodes[0]
    return node if node is not None and node.target is aten.linear.default else None


def _join(graph: Graph, products: list[Node | None]) -> bool:
    parts = [part for part in products if part is not None]
    if len(parts) != 3 or len(set(parts)) != 3:
        return False
    packed = joined(graph, parts)
    if packed is None:
        return False
    widths = [int(part.meta["val"].shape[-1]) for part in parts]
    values = torch.split(packed.meta["val"], widths, dim=-1)
    axis = packed.meta["val"].dim() - 1
    with graph.inserting_after(packed):
        cut = graph.call_function(aten.split_with_sizes.default, (packed, widths, axis))
    cut.meta = {"val": values}
    with graph.inserting_after(cut):
        for place, part in enumerate(parts):
            piece = graph.call_function(operator.getitem, (cut, place))
            piece.meta = dict(part.meta)
            part.replace_all_uses_with(piece)
            graph.erase_node(part)
    return True
