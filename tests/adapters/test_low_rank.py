"""LoRA and DoRA against slow loops written from their definitions, on awkward shapes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bone_fx.adapters import METHODS, LowRank
from bone_fx.errors import AdapterError

SHAPES = [(48, 80, 16), (50, 80, 3), (7, 5, 11), (1, 9, 1)]


def make(inputs: int, outputs: int, rank: int, *, dora: bool) -> tuple[Tensor, LowRank]:
    """A weight and a block in float64."""
    generator = torch.Generator().manual_seed(inputs + outputs)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    magnitude = draw(outputs).abs() if dora else None
    return draw(outputs, inputs), LowRank(draw(rank, inputs), draw(outputs, rank), 0.7, magnitude)


def slow_fold(w: Tensor, block: LowRank) -> Tensor:
    """The definition, element by element."""
    outputs, inputs = w.shape
    folded = w.clone()
    for o in range(outputs):
        for i in range(inputs):
            folded[o, i] += block.scale * sum(
                float(block.b[o, k] * block.a[k, i]) for k in range(block.rank)
            )
        if block.magnitude is not None:
            length = math.sqrt(sum(float(value) ** 2 for value in folded[o]))
            folded[o] *= float(block.magnitude[o]) / length
    return folded


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(("inputs", "outputs", "rank"), SHAPES)
def test_fold_is_the_definition(inputs: int, outputs: int, rank: int, dora: bool) -> None:
    w, block = make(inputs, outputs, rank, dora=dora)
    method, before = METHODS[block.method], w.clone()
    folded = method.fold(w, block)
    torch.testing.assert_close(folded, slow_fold(w, block), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(method.delta(w, block), folded - w, rtol=1e-12, atol=1e-12)
    assert torch.equal(w, before)
    assert method.fold_(w, block) is w
    assert torch.equal(w, folded)
    if method.delta_squares is not None:
        squares = float((folded - before).square().sum())
        assert method.delta_squares(block, inputs) == pytest.approx(squares, rel=1e-10)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_part_does_to_its_rows_and_columns_what_the_whole_does(dora: bool) -> None:
    w, block = make(48, 80, 16, dora=dora)
    columns = (0, 48) if dora else (5, 31)
    method = METHODS[block.method]
    part = method.part(block, (11, 60), columns)
    folded = method.fold(w[11:60, slice(*columns)], part)
    whole = method.fold(w, block)[11:60, slice(*columns)]
    torch.testing.assert_close(folded, whole, rtol=1e-12, atol=1e-12)
    assert method.grain(block) == 1


def test_one_of_stacked_weights() -> None:
    _, block = make(48, 80, 4, dora=False)
    stack = replace(block, a=torch.stack([block.a, 2 * block.a]), b=torch.stack([block.b] * 2))
    assert stack.misfit(48, 80, experts=2) is None
    assert torch.equal(stack.expert(1).a, 2 * block.a)
    assert "[80, 4]" in str(block.misfit(48, 72))
    assert block.misfit(48, 80) is None


def test_a_half_becomes_a_float_with_all_its_parts() -> None:
    _, block = make(48, 80, 4, dora=True)
    assert {tensor.dtype for tensor in block.to(torch.bfloat16).tensors()} == {torch.bfloat16}


def test_is_not_trained() -> None:
    for name in ("lora", "dora"):
        with pytest.raises(AdapterError, match="not trained"):
            METHODS[name].block_shape(48, 80, 16, 0)
