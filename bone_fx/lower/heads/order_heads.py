"""Orders the rows of a projection that a model packed head by head.

Before (gpt_neox; H heads of q, k and v beside each other, P = 3 * D):
    packed: [B, S, H*P] = linear(x, w [H*P, I], b)
    heads:  [B, H, S, P] = transpose(view(packed), 1, 2)
    q, k, v: [B, H, S, D] = chunk(heads, 3, -1)
    … GroupQueryAttention(…)

After:
    parts: [H, D, I], … = split(view(w, [H, P, I]), [D, D, D], 1)               likewise b
    ordered: [3*H*D, I] = cat(reshape(parts), 0)
    packed: [B, S, 3*H*D] = linear(x, ordered, …)
    flat: [B, S, H*D], … = split(packed, [H*D, H*D, H*D], 2)
    q: [B, H, S, D] = transpose(view(flat), 1, 2)                                likewise k, v

The order of a weight's rows never runs: the translation makes it a step of the weight's recipe.
Only where all three reach one attention operator, which takes them packed in that order.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from bone_fx.lower.cancel_reshapes import VIEWS
from bone_fx.lower.heads.pack_projections import columns_of
from bone_fx.lower.symbolic import CONTRIB, is_operator, operands
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten
MOVES = {
    *VIEWS,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
}


def order_heads(graph: Graph) -> Outcome:
    """Cuts q, k and v from ordered projections."""
    changed = 0
    for node in list(graph.nodes):
        if is_operator(node, CONTRIB, "GroupQueryAttention"):
            changed += _order(graph, [_cut_behind(part) for part in operands(node)[:3]])
    return Outcome(modified=changed > 0)


def _cut_behind(node: Node | None) -> Node | None:
    """The piece of a tensor of rank 4 that queries, keys or values are."""
    while node is not None:
        if node.meta["val"].dim() == 4 and columns_of(node) is not None:
            return node
        if node.target in MOVES or is_operator(node, CONTRIB, "RotaryEmbedding"):
            node = operands(node)[0] if node.target not in MOVES else node.all_input_nodes[0]
        else:
            return None
    return None


def _order(graph: Graph, pieces: list[Node | None]) -> bool:
    ranges = [columns_of(piece) for piece in pieces if piece is not None]
    cuts = [cut for cut in ranges if cut is not None]
    if len(cuts) != 3:
        return False
    heads, _, end = cuts[-1]
    bounds = [start for _, start, _ in cuts] + [end]
    ends = [stop for _, _, stop in cuts]
    if any(source is not heads for source, _, _ in cuts) or bounds[1:] != ends or bounds[0]:
        return False
    is_transpose = heads.target is aten.transpose.int
    axes = {int(a) % 4 for a in heads.args[1:3]} if is_transpose else set()  # type: ignore[arg-type]
    transposed = axes == {1, 2}
    view = heads.args[0] if transposed else heads
    if not isinstance(view, Node) or view.target not in VIEWS:
        return False
    linear, shape = view.args[:2]
    groups, period = view.meta["val"].shape[2:]
    whole = isinstance(linear, Node) and linear.target is aten.linear.default and not linear.kwargs
    if not whole or end != period or not isinstance(groups, int):
        return False
    assert isinstance(linear, Node)
    assert isinstance(shape, list | tuple)
    constants = linear.args[1:]
    if any(c is not None and (not isinstance(c, Node) or c.op != "placeholder") for c in constants):
        return False
    if linear.meta["val"].dim() != 3 or linear.meta["val"].shape[-1] != groups * period:
        return False
    widths = [stop - start for _, start, stop in cuts]
    with graph.inserting_before(view):
        ordered = [_ordered(graph, c, groups, widths) for c in constants if isinstance(c, Node)]
        packed = graph.call_function(aten.linear.default, (linear.args[0], *ordered))
        packed.meta = dict(linear.meta)
        value: torch.Tensor = packed.meta["val"]
        columns = [groups * width for width in widths]
        parts = torch.split(value, columns, dim=-1)
        cut = _call(graph, aten.split_with_sizes.default, (packed, columns, 2), parts)
        for place, (piece, width) in enumerate(zip(pieces, widths, strict=True)):
            assert piece is not None
            part = _call(graph, operator.getitem, (cut, place), parts[place])
            sizes = [*shape[:2], groups, width]
            node = _call(
                graph,
                aten.reshape.default,
                (part, sizes),
                value.new_empty((*value.shape[:2], groups, width)),
            )
            if transposed:
                swapped = node.meta["val"].transpose(1, 2)
                node = _call(graph, aten.transpose.int, (node, 1, 2), swapped)
            piece.replace_all_uses_with(node)
    return True


def _ordered(graph: Graph, constant: Node, groups: int, widths: list[int]) -> Node:
    """The rows of a weight or a bias, part by part."""
    value: torch.Tensor = constant.meta["val"]
    rest = list(value.shape[1:])
    sizes = [groups, sum(widths), *rest]
    view = _call(graph, aten.view.default, (constant, sizes), value.new_empty(sizes))
    pieces = torch.split(value.new_empty(sizes), widths, dim=1)
    cut = _call(graph, aten.split_with_sizes.default, (view, widths, 1), pieces)
    parts = []
    for place, width in enumerate(widths):
        part = _call(graph, operator.getitem, (cut, place), pieces[place])
        rows = [groups * width, *rest]
        parts.append(_call(graph, aten.reshape.default, (part, rows), value.new_empty(rows)))
    return _call(graph, aten.cat.default, (parts,), value.new_empty(value.shape))


def _call(
    graph: Graph, target: Callable[..., Any], args: tuple[Argument, ...], value: object
) -> Node:
    node = graph.call_function(target, args)
    node.meta = {"val": value}
    return node
