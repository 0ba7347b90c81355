"""A matrix that is not there until someone reads it, as a tensor.

Reshaped rows and casts of it are not there either; every other operator forms it and works on that.
A function that knows what it is made of may do without it (`deferred_loss`).
"""

from __future__ import annotations

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Deferred(ABC):
    """How to form a matrix.

    Args:
        shape: Rows and columns.
        dtype: Of the matrix.
        device: Of the matrix.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._whole: Tensor | None = None
        self._tensors: list[weakref.ref[DeferredTensor]] = []

    @property
    def is_formed(self) -> bool:
        """Whether someone read the matrix; it may have been changed in place since."""
        return self._whole is not None

    def whole(self) -> Tensor:
        """The matrix, the same tensor each time."""
        if self._whole is None:
            self._whole = self._form().to(self.dtype)
        return self._whole

    @abstractmethod
    def _form(self) -> Tensor:
        """The matrix, in any dtype."""

    def cast(self, dtype: torch.dtype) -> Self:
        """A copy in another dtype, of a matrix that is not formed."""
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def tensor(self, shape: Sequence[int] | None = None) -> DeferredTensor:
        """The matrix as a tensor; of another shape with the same columns if that is given."""
        made: DeferredTensor = Tensor._make_wrapper_subclass(
            DeferredTensor,
            self.shape if shape is None else tuple(shape),
            dtype=self.dtype,
            device=self.device,
        )
        made.of = self
        self._tensors.append(weakref.ref(made))
        return made

    def tensors(self) -> list[DeferredTensor]:
        """The matrix and what it was cast from, as tensors that are still there."""
        return [tensor for reference in self._tensors if (tensor := reference()) is not None]


class DeferredTensor(Tensor):
    """A matrix that is formed when it is read. Made by `Deferred.tensor`."""

    of: Deferred

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(_formed(self))

    # PyTorch refuses these of any subclass.

    def tolist(self) -> Any:
        """The numbers as nested lists."""
        return _formed(self).tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As an ordinary tensor."""
        return _formed(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, DeferredTensor) and not first.of.is_formed:
            if func is aten.view.default:
                shape = torch.empty(first.shape, device="meta").view(args[1]).shape
                if shape[-1:] == first.shape[-1:]:
                    return first.of.tensor(shape)
            if func is aten._to_copy.default and _only_casts(first, kwargs):
                return first.of.cast(kwargs["dtype"]).tensor(first.shape)
        return func(*tree_map(_formed, args), **tree_map(_formed, kwargs))


def deferred(value: Any) -> Any:
    """How to form a tensor that is not formed; None for any other value."""
    is_open = isinstance(value, DeferredTensor) and not value.of.is_formed
    return value.of if is_open else None


def _formed(value: Any) -> Any:
    return value.of.whole().view(value.shape) if isinstance(value, DeferredTensor) else value


def _only_casts(tensor: Tensor, options: dict[str, Any]) -> bool:
    dtype, device = options.get("dtype"), options.get("device")
    return dtype is not None and dtype.is_floating_point and device in (None, tensor.device)
