"""Gated products, norms and rotary embeddings against PyTorch's results of the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators import ACTIVATIONS, GATE_PRODUCT, RMS_NORM, ROTARY
from tests.operators.saved import kept, shapes

PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
EPS = 1e-5
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def two(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = (2 * torch.randn(2, 3, 10, generator=generator, dtype=torch.float64) for _ in "gu")
    gate, up = (tensor.to(dtype).requires_grad_() for tensor in made)
    return gate, up


def plain_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def test_every_activation_has_a_formula() -> None:
    assert PLAIN.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gate_product_is_the_product(activation: str, dtype: torch.dtype) -> None:
    gate, up = two(dtype)
    ours = GATE_PRODUCT(gate, up, activation)
    theirs = PLAIN[activation](gate) * up
    assert torch.equal(ours, theirs)
    weights = torch.linspace(-1, 1, ours.numel()).view_as(ours).to(dtype)
    found = torch.autograd.grad(ours, (gate, up), weights)
    for gradient, other in zip(
        found, torch.autograd.grad(theirs, (gate, up), weights), strict=True
    ):
        assert gradient.dtype == dtype
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("activation", PLAIN)
def test_gate_product_has_right_gradients_and_keeps_its_inputs_only(activation: str) -> None:
    gate, up = two()
    assert torch.autograd.gradcheck(lambda g, u: GATE_PRODUCT(g, u, activation), (gate, up))
    assert not kept(lambda: GATE_PRODUCT(gate, up, activation), gate, up)
    assert kept(lambda: PLAIN[activation](gate) * up, gate, up)
    up.requires_grad_(False)
    GATE_PRODUCT(gate, up, activation).sum().backward()
    assert up.grad is None


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("with_gain", [True, False])
def test_rms_norm_is_the_formula(dtype: torch.dtype, with_gain: bool) -> None:
    x, weights = two(dtype)
    gain = torch.linspace(0.5, 2, 10, dtype=dtype, requires_grad=True) if with_gain else None
    ours = RMS_NORM(x, gain, EPS)
    theirs = plain_norm(x) if gain is None else gain * plain_norm(x)
    assert torch.equal(ours, theirs)
    leaves = [x] if gain is None else [x, gain]
    # Beside a residual: its gradient comes between, or the sums would be others.
    found = torch.autograd.grad(x * 3 + ours, leaves, weights.detach())
    expected = torch.autograd.grad(x * 3 + theirs, leaves, weights.detach())
    for gradient, other in zip(found, expected, strict=True):
        assert torch.equal(gradient, other)


def test_rms_norm_has_right_gradients_and_keeps_one_number_a_token() -> None:
    x, _ = two()
    gain = torch.linspace(0.5, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: RMS_NORM(x, None, EPS), x)
    assert torch.autograd.gradcheck(lambda x, gain: RMS_NORM(x, gain, EPS), (x, gain))
    assert torch.autograd.gradcheck(lambda x: RMS_NORM(x, gain.detach(), EPS), x)
    assert torch.autograd.gradcheck(lambda gain: RMS_NORM(x.detach(), gain, EPS), gain)
    assert shapes(kept(lambda: RMS_NORM(x, gain, EPS), x, gain)) == [[2, 3, 1]]


def test_rms_norm_leaves_its_arguments_as_they_are() -> None:
    x, weights = two()
    before = x.detach().clone(), weights.detach().clone()
    RMS_NORM(x, None, EPS).backward(weights.detach())
    assert torch.equal(x, before[0])
    assert torch.equal(weights, before[1])


@pytest.mark.parametrize("with_gain", [True, False])
def test_rms_norm_is_computed_in_float32_under_autocast(with_gain: bool) -> None:
    x, _ = two(torch.bfloat16)
    gain = torch.linspace(0.5, 2, 10).to(torch.bfloat16) if with_gain else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = RMS_NORM(x, gain, EPS)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, plain_norm(x.float()) * (1 if gain is None else gain))
    ours.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def angles(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Of their own in both halves, as no model has them: a swap would show."""
    turn = torch.linspace(0, 5, 30, dtype=torch.float64).view(3, 10)
    return turn.cos().to(dtype), turn.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("transposed", [True, False])
def test_rotary_is_the_formula(dtype: torch.dtype, transposed: bool) -> None:
    x, weights = two(dtype)
    if transposed:
        x = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    ours, theirs = ROTARY(x, *angles(dtype)), plain_rotary(x, *angles(dtype))
    assert torch.equal(ours, theirs)
    (found,) = torch.autograd.grad(ours, x, weights.detach())
    assert torch.equal(found, torch.autograd.grad(theirs, x, weights.detach())[0])


def test_rotary_has_right_gradients_and_keeps_its_tables_only() -> None:
    x, _ = two()
    cos, sin = angles()
    assert torch.autograd.gradcheck(lambda x: ROTARY(x, cos, sin), x)
    assert not kept(lambda: ROTARY(x, cos, sin), cos, sin)


def test_rotary_with_tables_that_train_or_are_wider() -> None:
    x, _ = two()
    tables = [t.requires_grad_() for t in angles()]
    assert torch.autograd.gradcheck(lambda *args: ROTARY(*args), (x, *tables))
    half, wide = x.detach().to(torch.bfloat16), angles(torch.float32)
    ours = ROTARY(half, *wide)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, plain_rotary(half, *wide))


def test_a_step_on_the_meta_device() -> None:
    x = torch.randn(2, 3, 8, device="meta", requires_grad=True)
    table = torch.randn(3, 8, device="meta")
    y = ROTARY(GATE_PRODUCT(RMS_NORM(x, table[0], 1e-5), x, "silu"), table, table)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape


def test_second_derivatives_are_refused() -> None:
    x, up = two()
    made = (RMS_NORM(x, None, EPS), GATE_PRODUCT(x, up, "silu"), ROTARY(x, *angles()))
    for y in made:
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(UsageError, match="second derivatives"):
            first.sum().backward()
