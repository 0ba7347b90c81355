"""The gradient of logits that only a product reads, against PyTorch's own in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators import PRODUCT, lean_cross_entropy, logit_gradient
from bone_fx.operators.logit_gradient import GradientParts, LogitGradient
from tests.operators.test_product import everywhere, needs_onednn
from tests.tolerances import assert_agrees

ROWS, CLASSES, INPUTS = (2, 5), 13, 8
Head = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(
    params=["linear", "product", pytest.param("onednn", marks=needs_onednn)],
)
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Head:
    monkeypatch.setattr(logit_gradient, "_COLUMNS", 5)
    everywhere(monkeypatch, onednn=request.param == "onednn")
    return functional.linear if request.param == "linear" else lambda x, w: PRODUCT(x, w, None)


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[GradientParts]:
    """The gradients that were formed as a whole."""
    found: list[GradientParts] = []
    whole = GradientParts.whole

    def noted(self: GradientParts) -> Tensor:
        found.append(self)
        return whole(self)

    monkeypatch.setattr(GradientParts, "whole", noted)
    return found


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*ROWS, INPUTS, generator=generator)
    w = torch.randn(CLASSES, INPUTS, generator=generator)
    target = torch.randint(0, CLASSES, ROWS, generator=generator)
    target[0, 1] = -100
    return x, w, target


def loss_of(logits: Tensor, target: Tensor, *, lean: bool = True) -> Tensor:
    rows, classes = logits.view(-1, CLASSES), target.reshape(-1)
    if not lean:
        return functional.cross_entropy(rows, classes)
    with lean_cross_entropy():
        return functional.cross_entropy(rows, classes)


def expected(weight_trains: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, the logits and the weight in float64."""
    x, w, target = inputs()
    x, w = x.double().requires_grad_(), w.double().requires_grad_(weight_trains)
    logits = functional.linear(x, w)
    logits.retain_grad()
    loss_of(logits, target, lean=False).backward()
    assert x.grad is not None
    assert logits.grad is not None
    return x.grad, logits.grad, w.grad


def test_the_product_takes_parts(head: Head, formed: list[GradientParts]) -> None:
    x, w, target = inputs()
    x.requires_grad_()
    loss_of(head(x, w), target).backward()
    assert not formed
    assert type(x.grad) is Tensor
    assert_agrees(x.grad, expected()[0], "weight")


def test_a_weight_that_trains_has_its_gradient(head: Head) -> None:
    x, w, target = inputs()
    x.requires_grad_()
    w.requires_grad_()
    loss_of(head(x, w), target).backward()
    dx, _, dw = expected(weight_trains=True)
    assert x.grad is not None
    assert w.grad is not None
    assert dw is not None
    assert_agrees(x.grad, dx, "weight")
    assert_agrees(w.grad, dw, "weight")


@pytest.mark.parametrize("how", ["retain_grad", "hook", "hook on what is let go", "grad"])
def test_who_looks_at_the_gradient_sees_a_tensor(
    how: str, head: Head, formed: list[GradientParts]
) -> None:
    x, w, target = inputs()
    x.requires_grad_()
    logits = head(x, w)
    loss = loss_of(logits, target)
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
    assert len(formed) == 1
    assert_agrees(seen[0], expected()[1], "weight")
    if how != "grad":
        assert x.grad is not None
        assert_agrees(x.grad, expected()[0], "weight")


def test_two_readers_of_the_logits_add_up(head: Head) -> None:
    x, w, target = inputs()
    x.requires_grad_()
    logits = head(x, w)
    (loss_of(logits, target) + logits.square().sum()).backward()
    exact = x.detach().double().requires_grad_()
    again = functional.linear(exact, w.double())
    (loss_of(again, target, lean=False) + again.square().sum()).backward()
    assert x.grad is not None
    assert exact.grad is not None
    assert_agrees(x.grad, exact.grad, "weight")


def test_every_other_operator_works_on_the_whole() -> None:
    x, w, target = inputs()
    logits = functional.linear(x, w).view(-1, CLASSES)
    kept = torch.where(target != -100, target, 0).view(-1, 1)
    scale = (target != -100).view(-1, 1) / 9
    parts = GradientParts(logits, logits.logsumexp(-1, keepdim=True), kept, scale)
    lazy = parts.gradient((*ROWS, CLASSES))
    assert isinstance(lazy, LogitGradient)
    assert isinstance(lazy.view(-1, CLASSES), LogitGradient)
    assert isinstance(lazy.detach(), LogitGradient)
    whole = expected()[1]
    for found, exact in [
        (lazy * 2, whole * 2),
        (lazy.view(-1), whole.view(-1)),
        (
            lazy.view(-1, CLASSES).t() @ x.view(-1, INPUTS),
            whole.view(-1, CLASSES).t() @ x.double().view(-1, INPUTS),
        ),
        (lazy.sum(), whole.sum()),
        (torch.stack([lazy, lazy]), torch.stack([whole, whole])),
    ]:
        assert type(found) is Tensor
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    assert "LogitGradient" in repr(lazy)
