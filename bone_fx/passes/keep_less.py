"""Writes products of activations so that backward keeps less of them.

Before:
    %p = aten.pow(%x, 2); %m = aten.mean(%p, [-1], True); %a = aten.add(%m, 1e-5)
    %r = aten.rsqrt(%a);  %y = aten.mul(%x, %r)

    %s = aten.silu(%gate); %z = aten.mul(%s, %up)

After:
    %y = bone_fx.rms_normalise(%x, 1e-5)

    %z = bone_fx.gate_product(%gate, %up, 'silu')

A linear layer without a block becomes `bone_fx.product`, which is faster on some CPUs.

The values are those of the trace; the operators say what they keep. A norm that the trace computes
in half precision stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from bone_fx.operators import GATE_PRODUCT, PRODUCT, RMS_NORMALISE

aten = torch.ops.aten

_WHOLE = (torch.float32, torch.float64)


def keep_less(graph: Graph) -> int:
    """Replace root mean square norms, gated products and linear layers, in place; how many."""
    changed = 0
    for node in list(graph.nodes):
        if node.target is aten.mul.Tensor and len(node.args) == 2:
            changed += _normalise(graph, node) or _gate(graph, node)
        elif node.target is aten.linear.default and not node.kwargs:
            bias = node.args[2] if len(node.args) > 2 else None
            _replace(graph, node, PRODUCT, (*node.args[:2], bias))
            changed += 1
    return changed


def _normalise(graph: Graph, product: Node) -> bool:
    factors: tuple[Any, Any] = (product.args[0], product.args[1])
    for x, rate in (factors, factors[::-1]):
        if not isinstance(x, Node) or not _alone(rate, aten.rsqrt.default):
            continue
        total = rate.args[0]
        if not _alone(total, aten.add.Tensor) or not isinstance(total.args[1], float):
            continue
        mean = total.args[0]
        if not _alone(mean, aten.mean.dim) or mean.args[1:] != ([-1], True) or mean.kwargs:
            continue
        square = mean.args[0]
        if not _alone(square, aten.pow.Tensor_Scalar) or square.args != (x, 2):
            continue
        if _dtype(x) not in _WHOLE or _dtype(product) != _dtype(x):
            continue
        _replace(graph, product, RMS_NORMALISE, (x, total.args[1]))
        return True
    return False


def _gate(graph: Graph, product: Node) -> bool:
    factors: tuple[Any, Any] = (product.args[0], product.args[1])
    for active, up in (factors, factors[::-1]):
        name = _activation(active)
        if name is None or not isinstance(up, Node):
            continue
        gate = active.args[0]
        kinds = {_kind(node) for node in (gate, up, product)}
        if len(kinds) != 1 or None in kinds:
            continue
        _replace(graph, product, GATE_PRODUCT, (gate, up, name))
        return True
    return False


def _activation(node: Any) -> str | None:
    if _alone(node, aten.silu.default) and len(node.args) == 1:
        return "silu"
    if _alone(node, aten.gelu.default) and len(node.args) == 1:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(node.kwargs.get("approximate", "none"))
    return None


def _alone(node: Any, target: Any) -> bool:
    """Whether `node` is this operator, and has one reader."""
    return isinstance(node, Node) and node.target is target and len(node.users) == 1


def _dtype(node: Node) -> torch.dtype | None:
    return getattr(node.meta.get("val"), "dtype", None)


def _kind(node: Node) -> tuple[str, ...] | None:
    """Dtype and dimensions, which may be symbols; None for a node without a known value."""
    value: Any = node.meta.get("val")
    return None if value is None else (str(value.dtype), *map(str, value.shape))


def _replace(graph: Graph, old: Node, target: Any, arguments: tuple[Any, ...]) -> None:
    with graph.inserting_before(old):
        new = graph.call_function(target, arguments)
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    waiting = [old]
    while waiting:
        node = waiting.pop()
        if node.users or node.op == "placeholder":
            continue
        waiting += node.all_input_nodes
        graph.erase_node(node)
