"""Cross entropy of many classes that keeps the logits and one number a row.

PyTorch's keeps the log-softmax beside the logits and forms two gradients of their size; a
vocabulary of 49152 makes each of them larger than a layer's activations.

Shapes: T rows, V classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register

_CHUNK = 1 << 20
"""Numbers computed at a time: few enough to stay in a cache."""


class CrossEntropy(torch.autograd.Function):
    """Sum over the rows of `logsumexp(x) - x[target]`; second derivatives are refused."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, target_T: Tensor, ignore_index: int) -> Tensor:
        """A sum without dimensions, in the dtype of the logits."""
        counted = target_T != ignore_index
        index = torch.where(counted, target_T, 0).unsqueeze(1)
        total_T = _logsumexp(logits_TV)
        ctx.save_for_backward(logits_TV, total_T, index, counted)
        lost_T = total_T - logits_TV.gather(1, index).squeeze(1)
        return lost_T.masked_fill_(~counted, 0).sum()

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """`softmax(x) - onehot(target)`, in one tensor."""
        logits_TV, total_T, index, counted = ctx.saved_tensors
        scale = (counted * dy).unsqueeze(1)
        size = _rows(logits_TV)
        dx = torch.empty_like(logits_TV)
        parts = [torch.split(t, size) for t in (dx, logits_TV, total_T.unsqueeze(1), scale)]
        for out, rows, total, factor in zip(*parts, strict=True):
            torch.sub(rows, total, out=out).exp_().mul_(factor)
        dx.scatter_add_(1, index, -scale)
        return dx, None, None


def _logsumexp(logits_TV: Tensor) -> Tensor:
    """`[T]`, with one buffer for all parts."""
    size = _rows(logits_TV)
    total_T = logits_TV.new_empty(logits_TV.shape[0])
    buffer = torch.empty_like(logits_TV[:size])
    for rows, out in zip(torch.split(logits_TV, size), torch.split(total_T, size), strict=True):
        largest = rows.amax(-1).nan_to_num_(posinf=0.0, neginf=0.0, nan=torch.nan)
        exponents = torch.sub(rows, largest.unsqueeze(1), out=buffer[: len(rows)])
        torch.sum(exponents.exp_(), -1, out=out)
        out.log_().add_(largest)
    return total_T


def cross_entropy_sum(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The sum of the cross entropies of rows whose target is not `ignore_index`.

    Args:
        logits: `[T, V]`.
        target: `[T]`, classes, int64.
        ignore_index: The target of rows that do not count.

    Returns:
        A tensor without dimensions.
    """
    y: Tensor = CrossEntropy.apply(logits, target, ignore_index)  # type: ignore[no-untyped-call]
    return y


CROSS_ENTROPY_SUM = register(
    "cross_entropy_sum(Tensor logits, Tensor target, int ignore_index) -> Tensor",
    cross_entropy_sum,
)


class _LeanCrossEntropy(TorchFunctionMode):
    """Answers the calls of `functional.cross_entropy` that the function above can compute."""

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
    total: Tensor = CROSS_ENTROPY_SUM(input, target, ignore_index)
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum()


def _rows(logits_TV: Tensor) -> int:
    return max(1, _CHUNK // max(1, logits_TV.shape[1]))


@contextmanager
def lean_cross_entropy() -> Iterator[None]:
    """While open, `functional.cross_entropy` keeps less; under `torch.compile` it is PyTorch's."""
    if torch.compiler.is_compiling():
        yield
        return
    with _LeanCrossEntropy():
        yield
