"""Lets what a model computes on flattened tokens see the tokens as they come.

Before (opt):
    flat:   [B*S, W] = reshape(x)
    normed: [B*S, W] = layer_norm(flat)
    wide:   [B*S, V] = relu(linear(normed, …))
    sum:    [B*S, W] = add(flat, linear(wide, …))
    y:      [B, S, W] = view(sum)

After:
    normed: [B, S, W] = layer_norm(x)
    wide:   [B, S, V] = relu(linear(normed, …))
    y:      [B, S, W] = add(x, linear(wide, …))

Only operators that treat each token by itself, and only where each of their results ends in a view
that brings back the sizes which were joined: a result that is needed flat keeps all that leads to
it as it was.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.lower.cancel_reshapes import VIEWS, same_size
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

BY_ROW = {aten.linear.default, aten.layer_norm.default}
"""Operators on the last axis of their first argument; the others are weights."""

BY_ELEMENT = {
    aten.add.Tensor,
    aten.dropout.default,
    aten.gelu.default,
    aten.mul.Tensor,
    aten.relu.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.sub.Tensor,
    aten.tanh.default,
}
"""Operators on each element; all their tensors have the same shape here."""

Sizes = tuple[int | torch.SymInt, ...]


def keep_tokens(graph: Graph) -> Outcome:
    """Takes the views away from around operators that treat each token by itself."""
    leading: dict[Node, Sizes] = {}
    for node in graph.nodes:
        sizes = _joined(node) or _passed_on(node, leading)
        if sizes is not None:
            leading[node] = sizes
    while needed := [node for node in leading if not _may_change(node, leading)]:
        for node in needed:
            del leading[node]
    changed = [node for node in leading if node.target not in VIEWS]
    for node in changed:
        _change(node, leading)
    return Outcome(modified=bool(changed))


def _joined(node: Node) -> Sizes | None:
    """The leading sizes that a view makes one; None if the node does something else."""
    if node.target not in VIEWS or not isinstance(node.args[0], Node):
        return None
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    joins = len(before) > 2 and len(after) == 2 and same_size(before[-1], after[-1])
    return tuple(before[:-1]) if joins else None


def _passed_on(node: Node, leading: dict[Node, Sizes]) -> Sizes | None:
    """The leading sizes that a result would have with unflattened tokens."""
    if node.kwargs or not node.args:
        return None
    if node.target in BY_ROW:
        flat, *rest = node.args
        tensors = [flat]
        if any(isinstance(argument, Node) and argument in leading for argument in rest):
            return None
        if node.target is aten.layer_norm.default and len(rest[0]) != 1:  # type: ignore[arg-type]
            return None
    elif node.target in BY_ELEMENT:
        tensors = [argument for argument in node.args if isinstance(argument, Node)]
    else:
        return None
    shapes = [leading.get(tensor) for tensor in tensors if isinstance(tensor, Node)]
    if not shapes or any(sizes is None or not _same(sizes, shapes[0]) for sizes in shapes):
        return None
    return shapes[0]


def _may_change(node: Node, leading: dict[Node, Sizes]) -> bool:
    """Whether all that the node reads and all that reads it agree on unflattened tokens."""
    if node.target in VIEWS:
        return True  # it goes only if nothing reads it any more
    flat = [a for a in node.args if isinstance(a, Node) and a.meta["val"].dim() == 2]
    flat = flat[:1] if node.target in BY_ROW else flat
    return all(source in leading for source in flat) and all(
        user in leading if user.target not in VIEWS else _restores(user, leading[node])
        for user in node.users
    )


def _restores(view: Node, leading: Sizes) -> bool:
    sizes = view.meta["val"].shape
    source = view.args[0]
    assert isinstance(source, Node)
    return _same(tuple(sizes[:-1]), leading) and same_size(sizes[-1], source.meta["val"].shape[-1])


def _change(node: Node, leading: dict[Node, Sizes]) -> None:
    value: torch.Tensor = node.meta["val"]
    node.meta["val"] = value.new_empty((*leading[node], value.shape[-1]))
    for source in list(node.all_input_nodes):
        if source in leading and source.target in VIEWS:
            before = source.args[0]
            assert isinstance(before, Node)
            node.replace_input_with(source, before)
    for user in list(node.users):
        if user.target in VIEWS:
            user.replace_all_uses_with(node)


def _same(a: Sizes, b: Sizes | None) -> bool:
    return b is not None and len(a) == len(b) and all(map(same_size, a, b))
