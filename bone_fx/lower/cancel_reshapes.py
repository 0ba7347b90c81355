"""Cancels reshapes and transpositions that undo each other.

Before:
    q:      [B, S, H*D] = linear(...)
    view:   [B, S, H, D] = view(q)
    head:   [B, H, S, D] = transpose(view, 1, 2)
    back:   [B, S, H, D] = transpose(head, 1, 2)
    flat:   [B, S, H*D] = reshape(back)
    GroupQueryAttention(flat, ...)

After:
    q:      [B, S, H*D] = linear(...)
    GroupQueryAttention(q, ...)
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument

from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
RESHAPES = {
    *VIEWS,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
}
COPIES = {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}


def cancel_reshapes(graph: Graph) -> Outcome:
    """Removes reshapes of reshapes, transpositions of transpositions, and copies.

    It requires `no_mutable_operators`: where tensors change in place, a view and a copy differ.
    """
    changed = False
    for node in list(graph.nodes):
        source = _source(node)
        if source is not None:
            for user in node.users:
                if user.target in VIEWS:  # what the node made contiguous need not be any more
                    user.target = aten.reshape.default
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            changed = True
        elif node.target in RESHAPES and _is_reshape(node.args[0]):
            base = node.args[0].args[0]
            with graph.inserting_before(node):
                shape = _shape_argument(node)
                if shape is None:
                    continue
                merged = graph.call_function(aten.reshape.default, (base, shape))
            merged.meta = dict(node.meta)
            node.replace_all_uses_with(merged)
            graph.erase_node(node)
            changed = True
    return Outcome(modified=changed)


def _source(node: Node) -> Node | None:
    """The node that has the same value, if `node` changes nothing."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    inner = node.args[0]
    if node.target in COPIES:
        return inner
    if _is_reshape(node):
        base = inner
        while _is_reshape(base) or base.target in COPIES:
            following = base.args[0]
            assert isinstance(following, Node)
            base = following
        if same_shape(node, base):
            return base
        return None
    axes = _axes(node)
    inner_axes = _axes(inner)
    if axes and inner_axes and axes == inner_axes:
        outer = inner.args[0]
        assert isinstance(outer, Node)
        return outer
    return None


def _is_reshape(node: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in RESHAPES


def _axes(node: Node) -> tuple[int, int] | None:
    """The two axes that a transposition swaps, counted from 0."""
    if node.target is not aten.transpose.int:
        return None
    rank = node.meta["val"].dim()
    a, b = (int(axis) % rank for axis in node.args[1:3])  # type: ignore[arg-type]  # axes are numbers
    return (min(a, b), max(a, b))


def same_shape(a: Node, b: Node) -> bool:
    """Whether the tensors of two nodes have the same shape for all sizes."""
    x, y = a.meta.get("val"), b.meta.get("val")
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor) or x.dim() != y.dim():
        return False
    return all(same_size(m, n) for m, n in zip(x.shape, y.shape, strict=True))


def same_size(m: int | torch.SymInt, n: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for all inputs."""
    if isinstance(m, torch.SymInt) or isinstance(n, torch.SymInt):
        expressions = [s.node.expr if isinstance(s, torch.SymInt) else s for s in (m, n)]
        return bool(expressions[0] == expressions[1])
    return m == n


def _shape_argument(node: Node) -> Argument | None:
    if node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return node.args[1]
    return None
