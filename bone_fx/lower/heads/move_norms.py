"""Norms of single heads before the transposition of heads and tokens.

Before (gemma3):
    heads:  [B, H, S, D] = transpose(x [B, S, H, D], 1, 2)
    normed: [B, H, S, D] = SimplifiedLayerNormalization(heads, scale [D])        or layer_norm

After:
    first:  [B, S, H, D] = SimplifiedLayerNormalization(x, scale)
    normed: [B, H, S, D] = transpose(first, 1, 2)

The norm treats each row of the last axis by itself, so that the transposition meets the one before
the attention operator, and both are cancelled.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.lower.symbolic import is_operator, operands
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def move_norms(graph: Graph) -> Outcome:
    """Moves each norm over the last axis before the transposition that only it reads."""
    changed = sum(_move(graph, node) for node in list(graph.nodes))
    return Outcome(modified=changed > 0)


def is_row_norm(node: Node) -> bool:
    """Whether a node is a norm over the last axis alone, of its first operand."""
    if is_operator(node, "", "SimplifiedLayerNormalization"):
        scale = operands(node)[1]
        return scale is not None and scale.meta["val"].dim() == 1
    if node.target is not aten.layer_norm.default:
        return False
    shape = node.args[1]
    return isinstance(shape, list | tuple) and len(shape) == 1


def _move(graph: Graph, norm: Node) -> bool:
    if not is_row_norm(norm):
        return False
    heads = norm.all_input_nodes[0]
    if heads.target is not aten.transpose.int or len(heads.users) != 1:
        return False
    source = heads.args[0]
    rank = heads.meta["val"].dim()
    a, b = (int(axis) % rank for axis in heads.args[1:3])  # type: ignore[arg-type]
    if rank - 1 in (a, b) or not isinstance(source, Node):
        return False
    with graph.inserting_after(norm):
        back = graph.call_function(aten.transpose.int, (norm, a, b))
    back.meta = dict(norm.meta)
    norm.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    norm.replace_input_with(heads, source)
    norm.meta["val"] = norm.meta["val"].transpose(a, b)
    shape = norm.kwargs.get("shape")
    if isinstance(shape, list | tuple):
        sizes = list(shape)
        sizes[a], sizes[b] = sizes[b], sizes[a]
        norm.update_kwarg("shape", sizes)
    graph.erase_node(heads)
    return True
