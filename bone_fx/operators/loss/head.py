"""`bone_fx::head`: the linear layer that makes the logits, which a loss may take in chunks.

Shapes: T tokens, V classes, I in_features of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators.library import register
from bone_fx.operators.loss.linear_cross_entropy import chunk_rows
from bone_fx.operators.plain import is_plain


class HeadInputs:
    """The inputs of a head whose logits are not formed.

    Args:
        x: `[..., I]`.
        weight: `[V, I]`, frozen.
        bias: `[V]`, frozen, or None.

    Attributes:
        placeholder: An empty tensor that stands for the logits in the graph's output.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.x, self.weight, self.bias = x, weight, bias
        self.placeholder = x.new_empty(0)
        self._version = weight._version

    def logits(self) -> Tensor:
        """The logits `[..., V]`, through which gradients flow.

        Raises:
            UsageError: The head's weight was changed since.
        """
        if self.weight._version != self._version:
            raise UsageError(
                "the logits of a training step are read after their head's weight was changed",
                next_step="read them before; or call the model without labels",
            )
        with torch.enable_grad():
            return functional.linear(self.x, self.weight, self.bias)


@dataclass
class _Request:
    """A loss that would take the inputs of a head; `inputs` is set by the first that has many.

    Attributes:
        always: Whether by any head, few logits or many, frozen or not.
    """

    always: bool = False
    inputs: HeadInputs | None = None


_REQUEST: ContextVar[_Request | None] = ContextVar("request", default=None)


@contextmanager
def head_inputs(*, always: bool = False) -> Iterator[_Request]:
    """While open, the first head that may leaves its inputs here instead."""
    request = _Request(always)
    token = _REQUEST.set(request)
    try:
        yield request
    finally:
        _REQUEST.reset(token)


def head(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer whose result, `[..., V]`, only the model's output has."""
    request = _REQUEST.get()
    if request is None or request.inputs or not (request.always or _can_wait(x, weight, bias)):
        return functional.linear(x, weight, bias)
    request.inputs = HeadInputs(x, weight, bias)
    return request.inputs.placeholder


HEAD = register("head(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", head)
"""The operator as it stands in graphs: `torch.ops.bone_fx.head.default`."""


def _can_wait(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the logits are more than a chunk, the head frozen, and the gradient of x wanted."""
    fixed = (weight,) if bias is None else (weight, bias)
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not any(tensor.requires_grad for tensor in fixed)
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(tensor.dtype == x.dtype for tensor in fixed)
        and x.numel() // x.shape[-1] > chunk_rows(weight)
        and not torch.is_autocast_enabled(x.device.type)
        and is_plain(x, *fixed)
    )
