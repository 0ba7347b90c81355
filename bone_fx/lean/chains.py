"""Writes chains over activations as operators: backward keeps less, or they are read less often.

Before:
    %p = aten.pow(%x, 2); %m = aten.mean(%p, [-1], True); %a = aten.add(%m, 1e-5)
    %r = aten.rsqrt(%a);  %n = aten.mul(%x, %r); %y = aten.mul(%gain, %n)

    %s = aten.silu(%gate); %z = aten.mul(%s, %up)

    %a = aten.mul(%q, %cos); %r = aten.cat([aten.neg(%q[..., D/2:]), %q[..., :D/2]], -1)
    %b = aten.mul(%r, %sin); %y = aten.add(%a, %b)

After:
    %y = bone_fx.rms_norm(%x, %gain, 1e-5)

    %z = bone_fx.gate_product(%gate, %up, 'silu')

    %y = bone_fx.rotary(%q, %cos, %sin)

The values are those of the trace; the operators say what they keep. Norms and rotary embeddings
that the trace computes in half precision stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from bone_fx.graphs import erase_unread
from bone_fx.operators import GATE_PRODUCT, RMS_NORM, ROTARY
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

_WHOLE = (torch.float32, torch.float64)


def keep_less(graph: Graph) -> Outcome:
    """Replace norms, gated products and rotary embeddings."""
    changed = 0
    for node in list(graph.nodes):
        if not node.users:  # of what was replaced before
            continue
        if node.target is aten.mul.Tensor and len(node.args) == 2:
            changed += _normalise(graph, node) or _gate(graph, node)
        elif node.target is aten.add.Tensor and len(node.args) == 2 and not node.kwargs:
            changed += _rotate(graph, node)
    return Outcome(modified=changed > 0)


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
        scaled, gain = _gain(product, x)
        _replace(graph, scaled, RMS_NORM, (x, gain, total.args[1]))
        return True
    return False


def _gain(normed: Node, x: Node) -> tuple[Node, Node | None]:
    """What the norm is followed by: the product with its gain, and the gain; else itself."""
    node = normed
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.to.dtype and user.args == (node, _dtype(x)) and not user.kwargs:
            node = user
            continue
        gain = _other(user, node) if user.target is aten.mul.Tensor else None
        if gain is None or not _is_gain(gain, x):
            break
        return user, gain
    return normed, None


def _is_gain(node: Node, x: Node) -> bool:
    """Whether a value has the dtype of x and its last dimension only."""
    narrow, wide = _kind(node), _kind(x)
    return narrow is not None and wide is not None and narrow == (wide[0], wide[-1])


def _other(product: Node, factor: Node) -> Node | None:
    """The other factor of a product, if it is a node that stands before the first."""
    others = [n for n in product.args if n is not factor]
    return others[0] if len(others) == 1 and isinstance(others[0], Node) else None


def _rotate(graph: Graph, total: Node) -> bool:
    terms: tuple[Any, Any] = (total.args[0], total.args[1])
    for straight, rotated in (terms, terms[::-1]):
        if not (_alone(straight, aten.mul.Tensor) and _alone(rotated, aten.mul.Tensor)):
            continue
        for halves, sin in (rotated.args, rotated.args[::-1]):
            x = _turned(halves)
            cos = None if x is None else _other(straight, x)
            if x is None or cos is None or not isinstance(sin, Node):
                continue
            if _kind(total) != _kind(x) or _dtype(x) not in _WHOLE:
                continue
            if {_dtype(cos), _dtype(sin)} != {_dtype(x)} or not _as_wide(x, cos, sin):
                continue
            _replace(graph, total, ROTARY, (x, cos, sin))
            return True
    return False


def _turned(node: Any) -> Node | None:
    """The x of `cat([-x[..., D/2:], x[..., :D/2]], -1)`."""
    if not _alone(node, aten.cat.default) or len(node.args) != 2 or len(node.args[0]) != 2:
        return None
    negated, first = node.args[0]
    if not _alone(negated, aten.neg.default) or not _alone(first, aten.slice.Tensor):
        return None
    second, x = negated.args[0], first.args[0]
    value: Any = x.meta.get("val") if isinstance(x, Node) else None
    if not _alone(second, aten.slice.Tensor) or value is None:
        return None
    rank, width = value.dim(), value.shape[-1]
    last = (-1, rank - 1)
    if not isinstance(width, int) or width % 2 or node.args[1] not in last:
        return None
    half = width // 2
    if first.args[1] not in last or first.args != (x, first.args[1], 0, half):
        return None
    if second.args[1] not in last or second.args[:3] != (x, second.args[1], half):
        return None
    return x if len(second.args) == 4 and second.args[3] >= width else None


def _as_wide(*nodes: Node) -> bool:
    """Whether the last dimension of all is the same."""
    return len({str(node.meta["val"].shape[-1]) for node in nodes}) == 1


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
    erase_unread(graph, old)
