"""The loss of a frozen head in chunks, and its gradient, against PyTorch's own in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators import HEAD, HeadInputs, head_inputs, linear_cross_entropy
from bone_fx.operators.loss.linear_cross_entropy import CHUNK
from tests.operators.saved import kept
from tests.tolerances import assert_agrees

ROWS, CLASSES, INPUTS = (2, 5), 13, 8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time."""
    monkeypatch.setitem(CHUNK, "cpu", 4 * CLASSES)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the head reads, its weight and bias, and the targets."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*ROWS, INPUTS, generator=generator)
    w = torch.randn(CLASSES, INPUTS, generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    target = torch.randint(0, CLASSES, ROWS, generator=generator)
    target[0, 1] = -100
    return x.to(dtype).requires_grad_(), w.to(dtype), bias.to(dtype), target


def expected(bias: bool = True, **options: Any) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of x in float64."""
    x, w, b, target = inputs(torch.float64)
    logits = functional.linear(x, w, b if bias else None)
    loss = functional.cross_entropy(logits.view(-1, CLASSES), target.view(-1), **options)
    (dx,) = torch.autograd.grad(3 * loss, x)
    return loss.detach(), dx


@pytest.mark.parametrize("chunk", [1, 4, 10, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_mean_and_its_gradient(bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", chunk * CLASSES)
    x, w, b, target = inputs()
    loss = linear_cross_entropy(x, w, b if bias else None, target)
    (3 * loss).backward()
    exact, dx = expected(bias)
    assert x.grad is not None
    assert_agrees(loss, exact, "weight")
    assert_agrees(x.grad, dx, "weight")


@pytest.mark.parametrize("divisor", [7, 7.0, torch.tensor(7)])
def test_sum_over_a_divisor(divisor: Any) -> None:
    x, w, b, target = inputs()
    loss = linear_cross_entropy(x, w, b, target, divisor)
    (3 * loss).backward()
    exact, dx = expected(reduction="sum")
    assert x.grad is not None
    assert_agrees(loss, exact / 7, "weight")
    assert_agrees(x.grad, dx / 7, "weight")


def test_another_class_can_be_the_ignored_one() -> None:
    x, w, b, target = inputs()
    target[target == -100] = 3
    loss = linear_cross_entropy(x, w, b, target, ignore_index=3)
    logits = functional.linear(x, w, b).view(-1, CLASSES)
    exact = functional.cross_entropy(logits, target.view(-1), ignore_index=3)
    assert_agrees(loss, exact, "weight")


def test_half_precision_is_rounded_as_the_product_rounds_it() -> None:
    x, w, b, target = inputs(torch.bfloat16)
    loss = linear_cross_entropy(x, w, b, target)
    (3 * loss).backward()
    again = x.detach().requires_grad_()
    logits = functional.linear(again, w, b).float().view(-1, CLASSES)
    other = functional.cross_entropy(logits, target.view(-1))
    (3 * other).backward()
    assert x.grad is not None
    assert again.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, again.grad, rtol=2**-7, atol=2**-7)


def test_no_row_that_counts() -> None:
    x, w, b, target = inputs()
    loss = linear_cross_entropy(x, w, b, torch.full_like(target, -100))
    loss.backward()
    assert bool(loss.isnan())  # as PyTorch's mean of nothing
    assert x.grad is not None
    assert not bool(x.grad.any())


def test_classes_that_are_masked_out() -> None:
    x, w, b, target = inputs()
    masked = b.masked_fill(torch.arange(CLASSES) == 0, float("-inf"))
    target[target == 0] = 1
    loss = linear_cross_entropy(x, w, masked, target)
    logits = functional.linear(x, w, masked).view(-1, CLASSES)
    exact = functional.cross_entropy(logits, target.view(-1))
    assert_agrees(loss, exact, "weight")
    (found,), (dx,) = (torch.autograd.grad(y, x) for y in (loss, exact))
    assert_agrees(found, dx, "weight")


def test_what_is_kept_is_of_the_size_of_the_input() -> None:
    x, w, b, target = inputs()
    found = kept(lambda: linear_cross_entropy(x, w, b, target), x, w, b)
    assert [tensor.numel() for tensor in found] == [x.numel()]


def test_labels_that_do_not_fit_are_refused() -> None:
    x, w, b, target = inputs()
    with pytest.raises(ValueError, match="9 labels for 10 rows"):
        linear_cross_entropy(x, w, b, target.view(-1)[1:])
    with pytest.raises(RuntimeError, match="out of bounds"):
        linear_cross_entropy(x, w, b, target.clamp(min=CLASSES))


def test_second_derivatives_are_refused() -> None:
    x, w, b, target = inputs()
    loss = linear_cross_entropy(x, w, b, target)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert_agrees(3 * dx, expected()[1], "weight")
    with pytest.raises(UsageError, match="second derivatives"):
        dx.sum().backward()


# The head that leaves its inputs to it.


def asked(x: Tensor, w: Tensor, b: Tensor | None) -> HeadInputs | None:
    with head_inputs() as request:
        y = HEAD(x, w, b)
    assert (request.inputs is None) == (y.shape == (*ROWS, CLASSES))
    return request.inputs


def test_inputs_in_place_of_logits() -> None:
    x, w, b, _ = inputs()
    with head_inputs() as request:
        first, second = HEAD(x, w, b), HEAD(x, w, b)
    assert request.inputs is not None
    assert first is request.inputs.placeholder
    logits = functional.linear(x, w, b)
    for found in (second, HEAD(x, w, b), request.inputs.logits()):
        assert torch.equal(found, logits)


def test_logits_have_gradients_wherever_they_are_read() -> None:
    x, w, b, _ = inputs()
    found = asked(x, w, b)
    assert found is not None
    with torch.no_grad():
        logits = found.logits()
    (dx,) = torch.autograd.grad(logits.square().sum(), x)
    (other,) = torch.autograd.grad(functional.linear(x, w, b).square().sum(), x)
    assert torch.equal(dx, other)


def test_a_weight_that_changed_is_told() -> None:
    x, w, b, _ = inputs()
    found = asked(x, w, b)
    assert found is not None
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(UsageError, match="weight was changed"):
        found.logits()


def test_when_logits_are_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b, _ = inputs()
    assert asked(x, w, None) is not None
    trained = [tensor.clone().requires_grad_() for tensor in (w, b)]
    with torch.autocast("cpu", torch.bfloat16):
        assert asked(x, w, b) is None
    with torch.no_grad():
        assert asked(x, w, b) is None
    half = [tensor.half() for tensor in (x, w, b)]
    for arguments in ((x.detach(), w, b), (x, trained[0], b), (x, w, trained[1]), half):
        assert asked(*arguments) is None
    monkeypatch.setitem(CHUNK, "cpu", 10 * CLASSES)  # one chunk
    assert asked(x, w, b) is None
