"""Gated products and root mean square norms against what PyTorch computes of the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators import ACTIVATIONS, GATE_PRODUCT, RMS_NORMALISE
from tests.operators.saved import kept, shapes
from tests.tolerances import assert_agrees

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
        assert_agrees(gradient, other, "output")


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
def test_rms_normalise_is_the_formula(dtype: torch.dtype) -> None:
    x, weights = two(dtype)
    ours, theirs = RMS_NORMALISE(x, EPS), plain_norm(x)
    assert torch.equal(ours, theirs)
    weights = weights.detach()
    (found,) = torch.autograd.grad(ours, x, weights)
    assert_agrees(found, torch.autograd.grad(theirs, x, weights)[0], "output")


def test_rms_normalise_has_right_gradients_and_keeps_one_number_a_token() -> None:
    x, _ = two()
    assert torch.autograd.gradcheck(lambda x: RMS_NORMALISE(x, EPS), x)
    assert shapes(kept(lambda: RMS_NORMALISE(x, EPS), x)) == [[2, 3, 1]]


def test_rms_normalise_is_computed_in_float32_under_autocast() -> None:
    x, _ = two(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = RMS_NORMALISE(x, EPS)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, plain_norm(x.float()))
    ours.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_second_derivatives_are_refused() -> None:
    x, up = two()
    for y in (RMS_NORMALISE(x, EPS), GATE_PRODUCT(x, up, "silu")):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(UsageError, match="second derivatives"):
            first.sum().backward()
