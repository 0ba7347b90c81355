"""Scales chosen for the second moments of a product's inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bone_fx.weights.recipes.nbits import QuantizedGroups, Scheme, encode, quantize
from bone_fx.weights.recipes.scale_search import quantize_together
from bone_fx.weights.recipes.second_moments import FACTORS, MEASURED, InputSums, SecondMoments

N, K, T = 40, 192, 400


def inputs(seed: int = 0, tokens: int = T) -> Tensor:
    """Tokens whose inputs move together, some of them far."""
    fixed = torch.Generator().manual_seed(7)
    mixed = torch.randn(12, K, generator=fixed) * torch.randn(K, generator=fixed).exp()
    generator = torch.Generator().manual_seed(seed)
    alone = 0.3 * torch.randn(tokens, K, generator=generator)
    return torch.randn(tokens, 12, generator=generator) @ mixed + alone


def weight() -> Tensor:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    w[0], w[1] = 0.0, w[1].abs()
    return w


def moments(x_TK: Tensor) -> SecondMoments:
    sums = InputSums(x_TK.shape[1])
    sums.add(x_TK)
    return sums.moments()


def error(groups: QuantizedGroups, x_TK: Tensor) -> float:
    return float((x_TK @ (groups.values() - weight()).t()).square().mean())


@pytest.mark.parametrize("scheme", [Scheme(4, 32, True, torch.float16), Scheme(4, 16)])
def test_products_are_closer_than_with_nearest_or_single_inputs(scheme: Scheme) -> None:
    known, other = inputs(), inputs(seed=5)
    found = moments(known)
    together = quantize_together(weight(), scheme, found)
    alone = quantize(weight(), scheme, found.squares)
    nearest = quantize(weight(), scheme)
    for x in (known, other):
        assert error(together, x) < 0.7 * error(alone, x)
        assert error(alone, x) < error(nearest, x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_the_codes_can_say_stays_exact(symmetric: bool) -> None:
    scheme = Scheme(4, 16, symmetric)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (N, K // 16, 16), generator=generator, dtype=torch.uint8)
    codes[..., 0], codes[..., 1] = 0, 15
    zeros = torch.full((N, K // 16), 8 if symmetric else 6, dtype=torch.uint8)
    scales = torch.randint(1, 64, (N, K // 16), generator=generator) / 256
    exact = QuantizedGroups(codes, scales, zeros).values()
    assert torch.equal(quantize_together(exact, scheme, moments(inputs())).values(), exact)


def test_codes_are_nearest_and_the_same_again() -> None:
    """Verification asks for nearest codes: it has the weight and no text."""
    scheme = Scheme(4, 32, True, torch.float16)
    one, other = (quantize_together(weight(), scheme, moments(inputs())) for _ in range(2))
    blocks = weight().view(N, -1, 32)
    nearest = encode(blocks, one.scales.float(), one.zeros.float(), scheme)
    assert torch.equal(one.codes, nearest.codes)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scales, other.scales)


def test_inputs_never_seen_change_nothing() -> None:
    scheme = Scheme(4, 32, True)
    for factors in (0, 3):
        unseen = SecondMoments(torch.zeros(K), torch.zeros(K, factors))
        found = quantize_together(weight(), scheme, unseen)
        assert torch.equal(found.codes, quantize(weight(), scheme).codes)


def test_moments_of_several_calls() -> None:
    x = inputs()
    expected = x.double().t() @ x.double() / T
    parts = InputSums(K)
    for part in torch.split(x.half(), 150):
        parts.add(part)
    for found, close in ((moments(x), 1e-3), (parts.moments(), 2e-2)):
        assert found.factors.shape == (K, FACTORS)
        torch.testing.assert_close(
            found.squares.double(), expected.diagonal(), rtol=2e-3, atol=1e-6
        )
        measured = (found.factors @ found.factors.t()).double() / MEASURED
        assert float((measured - expected).norm() / expected.norm()) < close
        assert bool((found.factors.square().sum(1) <= found.squares * 1.001).all())


def test_fewer_tokens_than_factors_and_fewer_inputs() -> None:
    for tokens, columns in ((5, 40), (90, 16)):
        x = inputs(tokens=tokens)[:, :columns]
        found = moments(x)
        measured = found.factors @ found.factors.t() / MEASURED
        torch.testing.assert_close(measured, x.t() @ x / tokens, rtol=1e-4, atol=1e-4)
