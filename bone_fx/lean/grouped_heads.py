"""Lets attention read grouped keys and values as they are, and leave out a mask that hides nothing.

Before:
    %u = aten.unsqueeze(%k [B, G, T, D], 2); %e = aten.expand(%u, [B, G, n, T, D])
    %r = aten.reshape(%e, [B, G·n, T, D])    (the same for values)
    %y = aten.scaled_dot_product_attention(%q [B, G·n, S, D], %r, %s, %mask)

After:
    %y = bone_fx.attention(%q, %k, %v, %mask, enable_gqa=True)

The operator repeats them where the device's kernels do not take them so. It also looks at the
mask's values, which no trace can: one that hides nothing, or only what comes later, is left out.
Attention under a mask whose heads are not repeated (`look_at_masks`) becomes the same operator:
    %y = bone_fx.attention(%q, %k, %v, %mask)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from bone_fx.graphs import erase_unread
from bone_fx.operators import ATTENTION
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

_TO_THE_END = 1 << 62


def group_heads(graph: Graph) -> Outcome:
    """Rewrite attention over repeated keys and values."""
    changed = False
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        query, key, value, *rest = node.args
        grouped = [_before_repetition(repeated) for repeated in (key, value)]
        heads = {_heads(n) for n in grouped}
        if None in heads or len(heads) != 1 or node.kwargs.get("enable_gqa", False):
            continue
        if _heads(query) != _heads(key) or _heads(key) != _heads(value):
            continue
        node.target = ATTENTION
        node.args = (query, *grouped, *rest)
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        for repeated in (key, value):
            erase_unread(graph, repeated)
        changed = True
    return Outcome(modified=changed)


def look_at_masks(graph: Graph) -> Outcome:
    """Rewrite attention under a mask of its own argument."""
    changed = False
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        is_masked = len(node.args) in (4, 5) and isinstance(node.args[3], Node)
        if is_masked and set(node.kwargs) <= {"scale", "enable_gqa"}:
            node.target = ATTENTION
            changed = True
    return Outcome(modified=changed)


def _before_repetition(node: Any) -> Node | None:
    """The grouped tensor behind one whose heads were repeated side by side."""
    if not _is(node, aten.reshape.default) or not _is(node.args[0], aten.expand.default):
        return None
    expanded = node.args[0]
    single = _whole(expanded.args[0])
    if not _is(single, aten.unsqueeze.default) or single.args[1] != 2:
        return None
    before, after = (_shape(n) for n in (single, expanded))
    result = _shape(node)
    if before is None or after is None or result is None or len(before) != 5:
        return None
    repeated = before[2] == "1" and before[:2] + before[3:] == after[:2] + after[3:]
    joined = [result[0], *result[2:]] == [after[0], *after[3:]]
    return _whole(single.args[0]) if repeated and joined else None


def _whole(node: Any) -> Any:
    """The tensor behind slices that leave nothing out."""
    while _is(node, aten.slice.Tensor) and len(node.args) == 4:
        _, _, start, end = node.args
        if start != 0 or not isinstance(end, int) or end < _TO_THE_END:
            break
        node = node.args[0]
    return node


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target and not node.kwargs


def _shape(node: Any) -> list[str] | None:
    value: Any = node.meta.get("val") if isinstance(node, Node) else None
    return None if value is None else [str(size) for size in value.shape]


def _heads(node: Any) -> str | None:
    shape = _shape(node)
    return None if shape is None or len(shape) != 4 else shape[1]
