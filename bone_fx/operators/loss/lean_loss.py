"""While a loss is computed, `functional.cross_entropy` is the one that keeps less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bone_fx.operators.loss.cross_entropy import CROSS_ENTROPY
from bone_fx.operators.loss.deferred import deferred
from bone_fx.operators.loss.deferred_loss import Logits, deferred_cross_entropy


class _LeanCrossEntropy(TorchFunctionMode):
    """Answers the calls of `functional.cross_entropy` that the operators here can compute."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.cross_entropy:
            answer = _answer(*args, **kwargs)
            if answer is not None:
                return answer
        return func(*args, **kwargs)


def _answer(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The arguments of `functional.cross_entropy`; None for a call of another kind."""
    plain = weight is None and size_average is None and reduce is None and not label_smoothing
    classes = input.dim() == 2 and target.dim() == 1 and not target.is_floating_point()
    if not (plain and classes and input.is_floating_point() and reduction in ("mean", "sum")):
        return None
    if input.dtype not in (torch.float32, torch.float64) or not input.requires_grad:
        return None
    answer = CROSS_ENTROPY
    if isinstance(deferred(input), Logits):
        answer = deferred_cross_entropy
    loss: Tensor = answer(input, target, ignore_index, reduction)
    return loss


@contextmanager
def lean_cross_entropy() -> Iterator[None]:
    """While open, `functional.cross_entropy` keeps less; under `torch.compile` it is PyTorch's."""
    if torch.compiler.is_compiling():
        yield
        return
    with _LeanCrossEntropy():
        yield
