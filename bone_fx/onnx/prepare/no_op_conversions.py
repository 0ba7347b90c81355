"""Operators that give their input back, or its values in another dtype or order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

_aten = torch.ops.aten

_CONVERSIONS = frozenset(
    {
        _aten._to_copy.default,
        _aten.to.device,
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten.to.other,
        _aten.type_as.default,
    }
)
_SAME = frozenset(
    {
        _aten.alias.default,
        _aten.clone.default,
        _aten.contiguous.default,
        _aten.detach.default,
        _aten.detach_.default,
        _aten.lift_fresh_copy.default,
    }
)
_SYNONYMS = {
    _aten.__and__.Scalar: _aten.bitwise_and.Scalar,
    _aten.__and__.Tensor: _aten.bitwise_and.Tensor,
    _aten.__or__.Scalar: _aten.bitwise_or.Scalar,
    _aten.__or__.Tensor: _aten.bitwise_or.Tensor,
    _aten.__xor__.Scalar: _aten.bitwise_xor.Scalar,
    _aten.__xor__.Tensor: _aten.bitwise_xor.Tensor,
    _aten.max.other: _aten.maximum.default,
    _aten.min.other: _aten.minimum.default,
    _aten.view.default: _aten.reshape.default,  # `contiguous` is removed, which a view minds
}
_DROPOUTS = frozenset({_aten.dropout.default, _aten.feature_dropout.default})


def replace_conversions(graph_module: GraphModule) -> None:
    """Removes what changes nothing and names what changes a dtype by one operator.

    Before: `aten.to.dtype_layout(x_f32, dtype=float16)`, `aten.contiguous(y)`, `aten.numpy_T(w)`
    After:  `prims.convert_element_type(x_f32, float16)`, `y`, `aten.permute(w, [1, 0])`
    """
    graph = graph_module.graph
    for node in graph.nodes:
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
            continue
        source = node.args[0]
        if node.target in _SAME or _is_inactive_dropout(node):
            _replace(node, source)
        elif node.target in _CONVERSIONS:
            before, after = source.meta.get("val"), node.meta.get("val")
            if not isinstance(before, Tensor) or not isinstance(after, Tensor):
                continue
            if before.dtype == after.dtype:
                _replace(node, source)
            else:
                node.target = torch.ops.prims.convert_element_type.default
                node.args, node.kwargs = (source, after.dtype), {}
        elif node.target in _SYNONYMS:
            node.target = _SYNONYMS[node.target]
        elif node.target is _aten.numpy_T.default:
            node.target = _aten.permute.default
            node.args = (source, list(reversed(range(node.meta["val"].dim()))))


def _is_inactive_dropout(node: Node) -> bool:
    return node.target in _DROPOUTS and (not node.args[2] or node.args[1] in (0, 0.0))


def _replace(node: Node, source: Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)
