"""Every method against a slow loop written from its definition, on awkward shapes, and its
gradients in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bone_fx.adapters import METHODS
from bone_fx.errors import UsageError
from bone_fx.operators import ADAPTED_LINEAR

SHAPES = [(48, 80, 16), (50, 80, 16), (24, 48, 64), (80, 48, 10), (7, 5, 3), (48, 48, 48)]
BAT_SHAPES = [(48, 80, 16), (48, 48, 8), (80, 40, 4), (6, 6, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def slow_fold(method: str, w: Tensor, block: Tensor) -> Tensor:
    """The definition, element by element, in Python's floats, which are float64."""
    weight, blocks = w.tolist(), block.tolist()  # a loop over a tensor's entries takes seconds
    folded = w.tolist()
    r = block.shape[-1] if method == "bat" else block.shape[0]
    for o, i in itertools.product(*map(range, w.shape)):
        if method == "bat":
            a, row, b, col = o // r, o % r, i // r, i % r
            turned = sum(weight[o][b * r + k] * blocks[a][k][col] for k in range(r))
            folded[o][i] += turned + blocks[a][row][col]
        else:
            folded[o][i] += blocks[i % r][o % block.shape[1]]
    return torch.tensor(folded, dtype=w.dtype)


def make(
    method: str, in_features: int, out_features: int, r: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A weight and a non-zero block."""
    generator = torch.Generator().manual_seed(in_features * 1000 + out_features + r)
    mini_r = next(m for m in (8, 4, 5, 3, 1) if out_features % m == 0)
    shape = METHODS[method].block_shape(in_features, out_features, r, mini_r)
    w = torch.randn(out_features, in_features, generator=generator, dtype=torch.float64)
    return w.to(dtype), (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(
        dtype
    )


def cases() -> list[tuple[str, int, int, int]]:
    """Every method on the shapes that it takes."""
    return [(m, *s) for m in ("bone", "mini") for s in SHAPES] + [("bat", *s) for s in BAT_SHAPES]


@pytest.mark.parametrize(("method", "in_features", "out_features", "r"), cases())
def test_fold_is_the_definition(method: str, in_features: int, out_features: int, r: int) -> None:
    w, block = make(method, in_features, out_features, r)
    before, block_before = w.clone(), block.clone()
    folded = METHODS[method].fold(w, block)
    torch.testing.assert_close(folded, slow_fold(method, w, block), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(METHODS[method].delta(w, block), folded - w, rtol=1e-12, atol=1e-12)
    assert torch.equal(w, before)
    assert torch.equal(block, block_before)
    in_place = METHODS[method].fold_(w, block)
    assert in_place is w
    assert torch.equal(w, folded)
    assert torch.equal(block, block_before)


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(["bone", "mini"]),
    in_features=st.integers(1, 40),
    out_features=st.integers(1, 24),
    r=st.integers(1, 50),
)
def test_additive_folds_hold_for_every_shape(
    method: str, in_features: int, out_features: int, r: int
) -> None:
    w, block = make(method, in_features, out_features, r)
    folded = METHODS[method].fold(w, block)
    torch.testing.assert_close(folded, slow_fold(method, w, block), rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 3, in_features, dtype=torch.float64)
    term = METHODS[method].term
    assert term is not None
    torch.testing.assert_close(
        x @ w.t() + term(x, block, out_features), x @ folded.t(), rtol=1e-9, atol=1e-9
    )


@settings(max_examples=30, deadline=None)
@given(r=st.integers(1, 6), a=st.integers(1, 5), b=st.integers(1, 5))
def test_bat_holds_for_every_shape_that_r_divides(r: int, a: int, b: int) -> None:
    w, block = make("bat", b * r, a * r, r)
    torch.testing.assert_close(
        METHODS["bat"].fold(w, block), slow_fold("bat", w, block), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "in_features", "out_features", "r"), cases())
def test_operator_is_the_folded_product(
    method: str, in_features: int, out_features: int, r: int, dtype: torch.dtype
) -> None:
    w, block = make(method, in_features, out_features, r, dtype)
    block = block.float()
    x = torch.randn(2, 3, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    bias = torch.randn(out_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    expected = x.float() @ METHODS[method].fold(w.float(), block).t() + bias.float()
    scale = float(expected.abs().max())
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for weight, transposed in ((w, False), (w.t().contiguous(), True)):
        y = ADAPTED_LINEAR(x, weight, bias, [block], [method], [], transposed)
        assert y.dtype == dtype
        assert float((y.float() - expected).abs().max()) <= tolerance * scale


@pytest.mark.parametrize(
    "methods",
    [["bone"], ["bat"], ["mini"], ["bone", "bat"], ["bat", "bone"], ["bat", "bat", "mini"]],
)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients(methods: list[str], transposed: bool) -> None:
    in_features, out_features, r = 12, 8, 4
    w = torch.randn(out_features, in_features, dtype=torch.float64)
    weight = (w.t().contiguous() if transposed else w).requires_grad_()
    x = torch.randn(2, 3, in_features, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(out_features, dtype=torch.float64, requires_grad=True)
    blocks = [make(m, in_features, out_features, r)[1].requires_grad_() for m in methods]

    def run(x: Tensor, weight: Tensor, bias: Tensor, *blocks: Tensor) -> Tensor:
        y: Tensor = ADAPTED_LINEAR(x, weight, bias, list(blocks), methods, [], transposed)
        return y

    assert torch.autograd.gradcheck(run, (x, weight, bias, *blocks))


def test_order_matters_for_bat_and_not_for_bone() -> None:
    w, bat = make("bat", 12, 8, 4)
    _, bone = make("bone", 12, 8, 4)
    fold = {name: method.fold for name, method in METHODS.items()}
    assert not torch.allclose(
        fold["bat"](fold["bone"](w, bone), bat), fold["bone"](fold["bat"](w, bat), bone)
    )
    x = torch.randn(5, 12, dtype=torch.float64)
    for methods, blocks in ((["bone", "bat"], [bone, bat]), (["bat", "bone"], [bat, bone])):
        folded = w
        for name, block in zip(methods, blocks, strict=True):
            folded = fold[name](folded, block)
        torch.testing.assert_close(
            ADAPTED_LINEAR(x, w, None, blocks, methods, [], False), x @ folded.t()
        )


def test_dropout_input_reaches_the_branch_only() -> None:
    w, block = make("bone", 12, 8, 4)
    x = torch.randn(5, 12, dtype=torch.float64)
    y = ADAPTED_LINEAR(x, w, None, [block], ["bone"], [torch.zeros_like(x)], False)
    torch.testing.assert_close(y, x @ w.t())


@pytest.mark.parametrize("method", ["bone", "bat"])
def test_autocast_keeps_blocks_in_float32(method: str) -> None:
    w, block = make(method, 48, 80, 16, torch.float32)
    block.requires_grad_()
    x = torch.randn(4, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ADAPTED_LINEAR(x, w, None, [block], [method], [], False)
    expected = x @ METHODS[method].fold(w, block).t()
    assert float((y.detach().float() - expected.detach()).abs().max()) < 2e-2 * float(
        expected.detach().abs().max()
    )
    y.float().sum().backward()
    assert block.grad is not None
    assert block.grad.dtype == torch.float32


def test_second_derivatives_of_bat_are_refused() -> None:
    w, block = make("bat", 12, 8, 4)
    block.requires_grad_()
    y = ADAPTED_LINEAR(
        torch.randn(5, 12, dtype=torch.float64), w, None, [block], ["bat"], [], False
    )
    (first,) = torch.autograd.grad(y.square().sum(), block, create_graph=True)
    with pytest.raises(UsageError, match="second derivatives"):
        first.sum().backward()


def test_refusals_name_what_would_fit() -> None:
    assert METHODS["bone"].refusal(50, 80, 64, 0) is None
    reason = METHODS["bat"].refusal(48, 80, 7, 0)
    assert reason is not None
    assert "divide" in reason
    assert "8" in reason
    reason = METHODS["mini"].refusal(48, 80, 16, 7)
    assert reason is not None
    assert "mini_r=7" in reason
