"""Cross entropy of many classes that keeps the logits and one number a row.

PyTorch's keeps the log-softmax beside the logits and forms two gradients of their size; a
vocabulary of 49152 makes each of them larger than a layer's activations. Here there is one, and
where a product with the head's weight is all that reads it, none (`logit_gradient`).

Shapes: T rows, V classes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bone_fx.operators.first_order import first_order
from bone_fx.operators.library import register
from bone_fx.operators.logit_gradient import GradientParts, rows_at_a_time


class CrossEntropy(torch.autograd.Function):
    """Sum over the rows of `logsumexp(x) - x[target]`; second derivatives are refused."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, target_T: Tensor, ignore_index: int, anchor: Tensor
    ) -> Tensor:
        """A sum without dimensions, in the dtype of the logits."""
        counted = target_T != ignore_index
        index = torch.where(counted, target_T, 0).unsqueeze(1)
        total_T = _logsumexp(logits_TV)
        ctx.save_for_backward(logits_TV, total_T, index, counted)
        ctx.seen = [weakref.ref(t) for t in (logits_TV, logits_TV._base) if t is not None]
        lost_T = total_T - logits_TV.gather(1, index).squeeze(1)
        return lost_T.masked_fill_(~counted, 0).sum()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """`softmax(x) - onehot(target)`: a `LogitGradient` where nobody looks at it."""
        if torch.is_grad_enabled() or _is_looked_at(ctx):
            return _whole_gradient(ctx, dy)
        parts = _parts_of_gradient(ctx, dy)
        return parts.gradient(parts.logits_TV.shape), None, None, None


@first_order
def _whole_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return _parts_of_gradient(ctx, dy).whole(), None, None, None


def _parts_of_gradient(ctx: Any, dy: Tensor) -> GradientParts:
    logits_TV, total_T, index, counted = ctx.saved_tensors
    return GradientParts(logits_TV, total_T.unsqueeze(1), index, (counted * dy).unsqueeze(1))


def _is_looked_at(ctx: Any) -> bool:
    """Whether someone may see the gradient: as that of a leaf, by a hook, or from `autograd.grad`.

    A call that names what it wants gradients of does not reach the anchor.
    """
    for reference in ctx.seen:
        logits = reference()
        if logits is not None and (logits.is_leaf or logits.retains_grad or logits._backward_hooks):
            return True
    anchor = ctx.next_functions[-1][0]
    return anchor is None or not torch._C._will_engine_execute_node(anchor)


def _logsumexp(logits_TV: Tensor) -> Tensor:
    """`[T]`, with one buffer for all parts."""
    size = rows_at_a_time(logits_TV.shape[1])
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
    anchor = torch.zeros((), requires_grad=True).clone()
    y: Tensor = CrossEntropy.apply(logits, target, ignore_index, anchor)  # type: ignore[no-untyped-call]
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


@contextmanager
def lean_cross_entropy() -> Iterator[None]:
    """While open, `functional.cross_entropy` keeps less; under `torch.compile` it is PyTorch's."""
    if torch.compiler.is_compiling():
        yield
        return
    with _LeanCrossEntropy():
        yield
