"""Cross entropy against PyTorch's own, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators import lean_cross_entropy
from bone_fx.operators.loss import cross_entropy
from bone_fx.operators.loss.cross_entropy import CROSS_ENTROPY
from tests.operators.saved import kept, shapes


def rows(
    number: int = 9, classes: int = 13, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(number, classes, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (number,), generator=generator)
    target[::4] = -100
    return logits.to(dtype).requires_grad_(), target


def both(logits: Tensor, target: Tensor, **options: Any) -> list[list[Tensor]]:
    """Loss and gradient of ours and of PyTorch's."""
    found = []
    for lean in (True, False):
        if lean:
            with lean_cross_entropy():
                loss = functional.cross_entropy(logits, target, **options)
        else:
            loss = functional.cross_entropy(logits, target, **options)
        scaled = (3 * loss).sum()
        found.append([loss, torch.autograd.grad(scaled, logits)[0]])
    return found


def is_ours(logits: Tensor, target: Tensor, **options: Any) -> bool:
    with lean_cross_entropy():
        loss = functional.cross_entropy(logits, target, **options)
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            if "CrossEntropyBackward" in node.name():
                return True
            waiting += [parent for parent, _ in node.next_functions]
    return False


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [-100, 3])
@pytest.mark.parametrize("chunk", [1 << 19, 40, 5])
def test_loss_and_gradient_are_pytorchs(
    dtype: torch.dtype, reduction: str, ignored: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK, "cpu", chunk)
    logits, target = rows(dtype=dtype)
    target[target == -100] = ignored
    options = {"reduction": reduction, "ignore_index": ignored}
    assert is_ours(logits, target, **options)
    ours, theirs = both(logits, target, **options)
    assert ours[0].dtype == dtype
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_gradients_agree_with_finite_differences() -> None:
    logits, target = rows(5, 7)
    assert torch.autograd.gradcheck(lambda x: CROSS_ENTROPY(x, target, -100, "sum"), logits)


def test_a_vocabulary_that_takes_several_chunks() -> None:
    logits, target = rows(25, 49152, torch.float32)
    ours, theirs = both(logits, target)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("number", [4, 0])
def test_no_row_that_counts(reduction: str, number: int) -> None:
    logits, target = rows(number)
    target[:] = -100
    ours, theirs = both(logits, target, reduction=reduction)
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    assert torch.equal(ours[1], theirs[1])


def test_classes_that_are_masked_out() -> None:
    logits, target = rows()
    with torch.no_grad():
        logits[:, 5] = float("-inf")
    target[target == 5] = 4
    ours, theirs = both(logits, target)
    assert bool(ours[1].isfinite().all())
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_other_calls_are_pytorchs_to_the_bit() -> None:
    logits, target = rows()
    weight = torch.linspace(0.1, 1, 13, dtype=torch.float64)
    probabilities = torch.softmax(torch.randn(9, 13, dtype=torch.float64), -1)
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (target, {"weight": weight}),
        (target, {"label_smoothing": 0.1}),
        (target, {"reduction": "none"}),
        (probabilities, {}),
    ]
    for labels, options in calls:
        assert not is_ours(logits, labels, **({"reduction": "sum"} | options))
        ours, theirs = both(logits, labels, **options)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_pytorchs_to_the_bit(dtype: torch.dtype, autocast: bool) -> None:
    logits, target = rows(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert not is_ours(logits, target)
        ours, theirs = both(logits, target)
    assert ours[0].dtype == theirs[0].dtype
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_a_target_that_is_no_class_is_refused() -> None:
    logits, target = rows()
    target[1] = 13
    with lean_cross_entropy(), pytest.raises(RuntimeError, match="out of bounds"):
        functional.cross_entropy(logits, target)


def test_no_number_is_kept_beside_the_logits() -> None:
    logits, target = rows()
    found = kept(lambda: CROSS_ENTROPY(logits, target, -100, "sum"), logits)
    assert not [t for t in found if t.is_floating_point()]
    assert shapes(found) == [[9], [9, 1]]  # which rows count, and their classes
    theirs = kept(lambda: functional.cross_entropy(logits, target), logits)
    assert [9, 13] in shapes(theirs)


def test_second_derivatives_are_refused() -> None:
    logits, target = rows()
    loss = CROSS_ENTROPY(logits, target, -100, "sum")
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(UsageError, match="second derivatives"):
        first.sum().backward()
