"""Writes pieces of the heads of a projection as columns of it.

Before (falcon: heads of k and v behind those of q; bloom: q, k and v of a head side by side):
    heads: [B, S, N, D] = view(x)                   heads: [B, S, H, 3, D] = view(x)
    q:     [B, S, H, D] = slice(heads, 2, 0, H)     k:     [B, S, H, D] = select(heads, 3, 1)

After:
    flat:  [B, S, H*D] = slice(x, 2, 0, H*D)        flat:  [B, S, H, 3*D] = reshape(x)
    q:     [B, S, H, D] = reshape(flat)             k:     [B, S, H, D] = slice(flat, 3, D, 2*D)
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from bone_fx.lower.cancel_reshapes import VIEWS
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def cut_columns(graph: Graph) -> Outcome:
    """Replaces pieces along the last axis but one of a view by pieces along the last axis."""
    changed = 0
    joined: dict[Node, Node] = {}
    for node in list(graph.nodes):
        changed += _cut(graph, node, joined)
    return Outcome(modified=changed > 0)


def _cut(graph: Graph, node: Node, flattened: dict[Node, Node]) -> bool:
    piece = _piece(node)
    if piece is None:
        return False
    view, start, end = piece
    x, shape = view.args[:2]
    value = view.meta["val"]
    number, size = value.shape[-2:]
    if not isinstance(x, Node) or not isinstance(shape, list | tuple):
        return False
    if not isinstance(number, int) or not isinstance(size, int):
        return False
    source = x.meta["val"]
    leading = list(shape[:-2])
    if view not in flattened:
        flattened[view] = x
        if source.dim() != len(leading) + 1 or source.shape[-1] != number * size:
            with graph.inserting_after(view):
                sizes = [*leading, number * size]
                flattened[view] = _reshaped(graph, x, sizes, value.flatten(-2))
    with graph.inserting_before(node):
        axis = len(leading)
        cut = graph.call_function(
            aten.slice.Tensor, (flattened[view], axis, start * size, end * size)
        )
        flat = value.flatten(-2)[..., start * size : end * size]
        cut.meta = {**node.meta, "val": flat}
        result = cut
        if node.target is aten.slice.Tensor:
            result = _reshaped(graph, cut, [*leading, end - start, size], node.meta["val"])
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _reshaped(graph: Graph, x: Node, sizes: list[Argument], value: torch.Tensor) -> Node:
    node = graph.call_function(aten.reshape.default, (x, sizes))
    node.meta = {**x.meta, "val": value}
    return node


def _piece(node: Node) -> tuple[Node, int, int] | None:
    """The view, the first and the end of what is cut along its last axis but one."""
    if node.target not in (aten.slice.Tensor, aten.select.int) or node.kwargs:
        return None
    view, axis = node.args[:2]
    if not isinstance(view, Node) or view.target not in VIEWS or not isinstance(axis, int):
        return None
    shape = view.meta["val"].shape
    if len(shape) < 4 or axis % len(shape) != len(shape) - 2 or not isinstance(shape[-2], int):
        return None
    if node.target is aten.select.int:
        index = node.args[2]
        return (view, index % shape[-2], index % shape[-2] + 1) if isinstance(index, int) else None
    start, end = (*node.args[2:4], None, None)[:2]
    if len(node.args) > 4 or any(not isinstance(n, int | None) for n in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(shape[-2])
    return (view, first, last) if first < last else None
