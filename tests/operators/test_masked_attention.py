"""Attention that looks at its mask: the results of the one that does not, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.operators import ATTENTION
from tests.operators.saved import kept

BATCH, HEADS, GROUPS, TOKENS, SIZE = 2, 4, 2, 70, 8


def triangle(tokens: int = TOKENS) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def padding() -> Tensor:
    lengths = torch.tensor([TOKENS, 40])
    return (torch.arange(TOKENS) < lengths[:, None])[:, None, None]


NEEDLESS = {
    "all": torch.ones(BATCH, 1, TOKENS, TOKENS, dtype=torch.bool),
    "no padding": torch.ones(BATCH, 1, 1, TOKENS, dtype=torch.bool),
    "triangle": triangle(),
    "triangles": triangle().expand(BATCH, 1, -1, -1),
}
NEEDED = {
    "padding": padding(),
    "padded triangle": padding() & triangle(),
    "window": (triangle() & ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(-20))[None],
    "last row": triangle().index_fill(0, torch.tensor([TOKENS - 1]), False),
    "one of two": torch.stack([triangle(), triangle().T])[:, None],
    "added": torch.zeros(TOKENS, TOKENS).masked_fill(~triangle(), float("-inf")),
    "bias": torch.linspace(-1, 1, TOKENS**2).view(TOKENS, TOKENS),
}


Three = tuple[Tensor, Tensor, Tensor]


def tensors(dtype: torch.dtype = torch.float32, heads: int = HEADS) -> Three:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, n, TOKENS, SIZE, generator=generator).to(dtype).requires_grad_()
        for n in (HEADS, heads, heads)
    )
    return q, k, v


def results(attend: Any, given: Three, mask: Tensor, **options: Any) -> list[Tensor]:
    y = attend(*given, mask, **options)
    return [y, *torch.autograd.grad(y.square().sum(), given)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [*NEEDLESS.values(), *NEEDED.values()], ids=[*NEEDLESS, *NEEDED])
def test_results_are_those_of_the_mask(mask: Tensor, dtype: torch.dtype) -> None:
    if mask.is_floating_point():
        mask = mask.to(dtype)
    ours = results(ATTENTION, tensors(dtype), mask, scale=0.3)
    theirs = results(functional.scaled_dot_product_attention, tensors(dtype), mask, scale=0.3)
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["all", "triangles", "padded triangle"])
def test_grouped_heads(name: str) -> None:
    mask = {**NEEDLESS, **NEEDED}[name]
    given = tensors(heads=GROUPS)
    ours = results(ATTENTION, given, mask, enable_gqa=True)
    plain = functional.scaled_dot_product_attention
    for found, expected in zip(ours, results(plain, given, mask, enable_gqa=True), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("mask", NEEDLESS.values(), ids=NEEDLESS)
def test_a_needless_mask_is_not_kept(mask: Tensor) -> None:
    given = tensors()
    found = kept(lambda: ATTENTION(*given, mask), *given)
    assert all(tensor.shape[-1] != TOKENS or tensor.dim() == 3 for tensor in found)


def test_calls_share_what_is_added_for_a_mask() -> None:
    mask = padding() & triangle()
    given = tensors()
    first, second = (
        [t for t in kept(lambda: ATTENTION(*given, mask), *given) if t.shape[-1] == TOKENS]
        for _ in range(2)
    )
    places = {tensor.untyped_storage().data_ptr() for tensor in first if tensor.dim() == 4}
    assert places
    assert places <= {tensor.untyped_storage().data_ptr() for tensor in second}


def test_a_mask_that_was_changed_is_looked_at_again() -> None:
    mask, given = triangle(), tensors()
    before = ATTENTION(*given, mask)
    for change in (lambda: mask.fill_(True), lambda: mask[:, 50:].fill_(False)):
        change()
        after = ATTENTION(*given, mask)
        assert not torch.equal(after, before)
        assert torch.equal(after, functional.scaled_dot_product_attention(*given, mask))


def test_under_autocast() -> None:
    given, mask = tensors(), padding() & triangle()
    with torch.autocast("cpu", torch.bfloat16):
        found = ATTENTION(*given, mask)
        expected = functional.scaled_dot_product_attention(*given, mask)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["triangle", "window"])
def test_dropout_drops_the_same(name: str) -> None:
    given, mask = tensors(), {**NEEDLESS, **NEEDED}[name]
    torch.manual_seed(0)
    found = ATTENTION(*given, mask, 0.5)
    torch.manual_seed(0)
    expected = functional.scaled_dot_product_attention(*given, mask, 0.5)
    assert torch.equal(found, expected)


def test_masks_made_in_inference_mode() -> None:
    with torch.inference_mode():
        given, mask = tensors(), triangle().clone()
        expected = functional.scaled_dot_product_attention(*given, mask)
        assert torch.equal(ATTENTION(*given, mask), expected)


def test_training_after_inference_mode_with_the_same_mask() -> None:
    given, mask = tensors(), padding() & triangle()
    with torch.inference_mode():
        ATTENTION(*given, mask)
    assert len(results(ATTENTION, given, mask)) == 4


def test_on_the_meta_device() -> None:
    q, k, v = (tensor.detach().to("meta") for tensor in tensors())
    assert ATTENTION(q, k, v, triangle().to("meta")).shape == q.shape


def test_it_compiles_for_every_mask() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda *all_: ATTENTION(*all_), backend="aot_eager", fullgraph=True)
    given = tensors()
    for mask in (triangle(), triangle() & ~torch.eye(TOKENS, dtype=torch.bool).roll(-9, 0)):
        expected = functional.scaled_dot_product_attention(*given, mask)
        assert torch.equal(compiled(*given, mask), expected)
