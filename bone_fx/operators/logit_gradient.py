"""The gradient of the logits, formed a few classes at a time where only a product reads it.

Logits of 49152 classes for 512 tokens take 100 MB, and their gradient as much again, at the moment
when backward holds the activations of every layer. What reads it as a rule is the head's product
`dx = dy W`, a sum over the classes.

Shapes: T rows, V classes, I in_features of the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from bone_fx.operators.product import times

aten = torch.ops.aten

CHUNK = 1 << 19
"""Numbers computed at a time: few enough to stay in a cache."""

_COLUMNS = 2048
"""Classes that a product takes at a time."""


def rows_at_a_time(classes: int) -> int:
    """How many rows of so many classes are a chunk."""
    return max(1, CHUNK // max(1, classes))


class GradientParts:
    """`(softmax(x) - onehot(index)) · scale`, from the logits x and their logsumexp.

    Args:
        logits_TV: `[T, V]`.
        total_T1: Their logsumexp, `[T, 1]`.
        index_T1: The class of each row, int64.
        scale_T1: The factor of each row.
    """

    def __init__(
        self, logits_TV: Tensor, total_T1: Tensor, index_T1: Tensor, scale_T1: Tensor
    ) -> None:
        self.logits_TV = logits_TV
        self._total_T1 = total_T1
        self._index_T1 = index_T1
        self._scale_T1 = scale_T1
        self._whole: Tensor | None = None

    def gradient(self, shape: Sequence[int]) -> LogitGradient:
        """The gradient in the shape of a view of the logits."""
        x = self.logits_TV
        made: LogitGradient = Tensor._make_wrapper_subclass(
            LogitGradient, tuple(shape), dtype=x.dtype, device=x.device
        )
        made.parts = self
        return made

    def whole(self) -> Tensor:
        """`[T, V]`, the same tensor each time."""
        if self._whole is None:
            dx = torch.empty_like(self.logits_TV)
            tensors = (dx, self.logits_TV, self._total_T1, self._scale_T1)
            size = rows_at_a_time(dx.shape[1])
            for part in zip(*(torch.split(t, size) for t in tensors), strict=True):
                _scaled_softmax(*part)
            self._whole = dx.scatter_add_(1, self._index_T1, -self._scale_T1)
        return self._whole

    def times(self, weight_VI: Tensor) -> Tensor:
        """The product with a weight, `[T, I]`, of which some columns exist at a time."""
        if self._whole is not None:
            return self._whole @ weight_VI
        rows, classes = self.logits_TV.shape
        buffer = self.logits_TV.new_empty(rows * min(classes, _COLUMNS))
        y_TI: Tensor | None = None
        for start in range(0, classes, _COLUMNS):
            logits = self.logits_TV[:, start : start + _COLUMNS]
            part = buffer[: logits.numel()].view(logits.shape)
            _scaled_softmax(part, logits, self._total_T1, self._scale_T1)
            index = self._index_T1 - start
            is_here = (index >= 0) & (index < part.shape[1])
            part.scatter_add_(1, index.clamp_(0, part.shape[1] - 1), -self._scale_T1 * is_here)
            y_TI = times(part, weight_VI[start : start + _COLUMNS].t(), added=y_TI)
        assert y_TI is not None
        return y_TI


def _scaled_softmax(out: Tensor, logits: Tensor, total_T1: Tensor, scale_T1: Tensor) -> None:
    torch.sub(logits, total_T1, out=out).exp_().mul_(scale_T1)


class LogitGradient(Tensor):
    """A gradient that is not there yet: its views are not either, and a product takes parts.

    Every other operator forms it first and works on that. Made by `GradientParts.gradient`.
    """

    parts: GradientParts

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LogitGradient({_formed(self)!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, LogitGradient) and not kwargs:
            if func is aten.view.default:
                shape = torch.empty(first.shape, device="meta").view(args[1]).shape
                if shape and shape[-1] == first.shape[-1]:
                    return first.parts.gradient(shape)
            if func is aten.detach.default:
                return first.parts.gradient(first.shape)
            if func is aten.mm.default and not isinstance(args[1], LogitGradient):
                return first.parts.times(args[1])
        return func(*tree_map(_formed, args), **tree_map(_formed, kwargs or {}))


def _formed(value: Any) -> Any:
    return value.parts.whole().view(value.shape) if isinstance(value, LogitGradient) else value
