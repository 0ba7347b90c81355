"""Logits that only the loss reads, and their gradient, against PyTorch's own in float64."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators import HEAD, lean_cross_entropy, loss_follows
from bone_fx.operators.loss import head
from bone_fx.operators.loss.deferred import Deferred, DeferredTensor
from tests.operators.saved import kept
from tests.tolerances import assert_agrees

ROWS, CLASSES, INPUTS = (2, 5), 13, 8


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of every size are deferred, and taken four rows at a time."""
    monkeypatch.setattr(head, "SPARING", {"cpu": 0})
    monkeypatch.setattr(head, "AT_A_TIME", {"cpu": 4 * CLASSES})


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was formed: logits or their gradient."""
    found: list[str] = []
    whole = Deferred.whole

    def noted(self: Deferred) -> Tensor:
        found.extend([] if self.is_formed else [type(self).__name__])
        return whole(self)

    monkeypatch.setattr(Deferred, "whole", noted)
    return found


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the head reads, its weight and bias, and the targets."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*ROWS, INPUTS, generator=generator)
    w = torch.randn(CLASSES, INPUTS, generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    target = torch.randint(0, CLASSES, ROWS, generator=generator)
    target[0, 1] = -100
    return x.to(dtype).requires_grad_(), w.to(dtype), bias.to(dtype), target


def logits_of(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    with loss_follows():
        y: Tensor = HEAD(x, w, bias)
    return y


def loss_of(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    """What transformers' causal loss does with logits that are not shifted."""
    with lean_cross_entropy():
        return functional.cross_entropy(
            logits.float().view(-1, CLASSES), target.view(-1), **options
        )


def expected(bias: bool = True, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logits, the loss, and the gradients of x and of the logits in float64."""
    x, w, b, target = inputs(torch.float64)
    logits = functional.linear(x, w, b if bias else None)
    logits.retain_grad()
    loss = functional.cross_entropy(logits.view(-1, CLASSES), target.view(-1), **options)
    (3 * loss).backward()
    assert x.grad is not None
    assert logits.grad is not None
    return logits.detach(), loss.detach(), x.grad, logits.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient_without_the_logits(
    bias: bool, reduction: str, formed: list[str]
) -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b if bias else None)
    loss = loss_of(logits, target, reduction=reduction)
    (3 * loss).backward()
    _, exact, dx, _ = expected(bias, reduction=reduction)
    assert not formed
    assert type(x.grad) is Tensor
    assert_agrees(loss, exact, "weight")
    assert_agrees(x.grad, dx, "weight")


def test_half_precision_is_rounded_as_the_product_rounds_it(formed: list[str]) -> None:
    x, w, b, target = inputs(torch.bfloat16)
    loss = loss_of(logits_of(x, w, b), target)
    (3 * loss).backward()
    assert not formed
    again = x.detach().requires_grad_()
    with lean_cross_entropy():
        logits = functional.linear(again, w, b).float().view(-1, CLASSES)
        other = functional.cross_entropy(logits, target.view(-1))
    (3 * other).backward()
    assert x.grad is not None
    assert again.grad is not None
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, again.grad, rtol=2**-7, atol=2**-7)


READERS: dict[str, Callable[[Tensor], Any]] = {
    "operator": lambda y: y * 1,
    "detach": lambda y: torch.from_numpy(y.detach().numpy()),
    "data": lambda y: y.data.clone(),
    "part": lambda y: torch.cat([y[:, :2], y[:, 2:]], 1),
    "list": lambda y: torch.tensor(y.tolist()),
    "view": lambda y: y.view(-1).view(y.shape),
    "save": lambda y: saved(y),
    "cast": lambda y: y.double(),
}


def saved(tensor: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    loaded: Tensor = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("loss_first", [True, False])
def test_who_reads_the_logits_finds_them(reader: str, loss_first: bool) -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b)
    assert isinstance(logits, DeferredTensor)
    loss = loss_of(logits, target) if loss_first else None
    exact, exact_loss, dx, _ = expected()
    torch.testing.assert_close(READERS[reader](logits).double(), exact, rtol=1e-5, atol=1e-5)
    assert repr(logits).startswith("tensor(")
    loss = loss_of(logits, target) if loss is None else loss
    (3 * loss).backward()
    assert x.grad is not None
    assert_agrees(loss, exact_loss, "weight")
    assert_agrees(x.grad, dx, "weight")


def test_a_change_of_the_logits_counts() -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b)
    logits.mul_(2)
    cast = logits_of(x, 2 * w, 2 * b).double()
    cast.div_(2).mul_(2)
    exact = functional.cross_entropy(2 * expected()[0].view(-1, CLASSES), target.view(-1))
    for changed in (logits, cast):
        x.grad = None
        loss = loss_of(changed, target)
        loss.backward()
        assert_agrees(loss, exact, "output")
        double, w_double, b_double, _ = inputs(torch.float64)
        again = 2 * functional.linear(double, w_double, b_double)
        functional.cross_entropy(again.view(-1, CLASSES), target.view(-1)).backward()
        assert x.grad is not None
        assert double.grad is not None
        assert_agrees(x.grad, double.grad, "weight")


@pytest.mark.parametrize("how", ["retain_grad", "hook", "hook on what is let go", "grad"])
def test_who_looks_at_their_gradient_sees_it(how: str, formed: list[str]) -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b)
    loss = 3 * loss_of(logits, target)
    seen: list[Tensor] = []
    if how == "grad":
        seen += torch.autograd.grad(loss, [logits])
    elif how.startswith("hook"):
        logits.register_hook(seen.append)
        if how != "hook":
            del logits
        loss.backward()
    else:
        logits.retain_grad()
        loss.backward()
        assert logits.grad is not None
        seen.append(logits.grad)
    assert type(seen[0]) is Tensor
    assert formed.count("LogitGradient") == 1
    _, _, dx, gradient = expected()
    assert_agrees(seen[0], gradient, "weight")
    if how != "grad":
        assert x.grad is not None
        assert_agrees(x.grad, dx, "weight")


def test_a_hook_before_a_cast_sees_a_tensor() -> None:
    x, w, b, target = inputs(torch.bfloat16)
    logits = logits_of(x, w, b)
    loss = 3 * loss_of(logits, target)
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    loss.backward()
    assert type(seen[0]) is Tensor
    assert seen[0].dtype == torch.bfloat16
    plain = functional.linear(x, w, b).detach().requires_grad_()
    (3 * functional.cross_entropy(plain.float().view(-1, CLASSES), target.view(-1))).backward()
    assert plain.grad is not None
    torch.testing.assert_close(seen[0], plain.grad, rtol=2**-8, atol=2**-12)


def test_a_change_after_the_loss_leaves_the_gradient_as_it_was() -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b)
    loss = 3 * loss_of(logits, target)
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    with torch.no_grad():
        logits.mul_(2)
    loss.backward()
    assert_agrees(seen[0], expected()[3], "weight")


@pytest.mark.parametrize("loss_first", [True, False])
def test_two_readers_add_up(loss_first: bool) -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b)
    terms = [lambda: loss_of(logits, target), lambda: logits.square().sum()]
    if not loss_first:
        terms.reverse()
    (terms[0]() + terms[1]()).backward()
    exact, w, b, _ = inputs(torch.float64)
    again = functional.linear(exact, w, b)
    loss = functional.cross_entropy(again.view(-1, CLASSES), target.view(-1))
    (loss + again.square().sum()).backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert_agrees(x.grad, exact.grad, "weight")


def test_what_is_kept_is_of_the_size_of_the_input() -> None:
    x, w, b, target = inputs()
    found = kept(lambda: loss_of(logits_of(x, w, b), target), x, w, b)
    assert max(tensor.numel() for tensor in found) == x.numel()


def test_a_weight_that_changed_is_told() -> None:
    x, w, b, target = inputs()
    logits = logits_of(x, w, b)
    loss = loss_of(logits, target)
    with torch.no_grad():
        w.mul_(2)
    loss.backward()
    assert x.grad is not None
    assert_agrees(3 * x.grad, expected()[2], "weight")
    with pytest.raises(UsageError, match="weight was changed"):
        logits.sum()


def test_second_derivatives_are_refused() -> None:
    x, w, b, target = inputs()
    loss = loss_of(logits_of(x, w, b), target)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    assert_agrees(3 * dx, expected()[2], "weight")
    with pytest.raises(UsageError, match="second derivatives"):
        dx.sum().backward()


def test_when_they_are_not_deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b, target = inputs()
    half = [tensor.half() for tensor in (x, w, b)]
    w_trains = w.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = [logits_of(x, w, b)]
    with torch.no_grad():
        found.append(logits_of(x, w, b))
    found += [HEAD(x, w, b), logits_of(x.detach(), w, b), logits_of(x, w_trains, b)]
    found += [logits_of(x, w, b.clone().requires_grad_()), logits_of(*half)]
    monkeypatch.setattr(head, "SPARING", {"cpu": 10 * CLASSES})
    found.append(logits_of(x, w, b))
    assert not any(isinstance(tensor, DeferredTensor) for tensor in found)
    loss_of(found[4], target).backward()
    assert w_trains.grad is not None
