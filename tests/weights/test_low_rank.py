"""Recipes of the LoRA family: in any bands and parts what the whole gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bone_fx.adapters import METHODS, LowRank
from bone_fx.weights.recipes import fold_recipe
from bone_fx.weights.recipes.change import Change
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import Value
from bone_fx.weights.recipes.rows import ReplacedRows
from bone_fx.weights.recipes.stack import Entry, Stack

OUT, IN = 80, 48
CHAINS = [["lora"], ["dora"], ["lora", "lora"], ["bone", "dora", "lora"], ["bat", "lora"]]


def _draw(*shape: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _step(method: str) -> FoldStep:
    if method in ("lora", "dora"):
        magnitude = _draw(OUT).abs() if method == "dora" else None
        return FoldStep(method, LowRank(_draw(5, IN), _draw(OUT, 5), 1.5, magnitude), method)
    return FoldStep(method, _draw(*METHODS[method].block_shape(IN, OUT, 16, 0)), method)


def _folded(weight: Tensor, steps: tuple[FoldStep, ...]) -> Tensor:
    folded = weight.double()
    for step in steps:
        folded = METHODS[step.method].fold(folded, step.block.to(torch.float64))
    return folded


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("band_bytes", [2 << 20, IN * 4 * 7, 64])
@pytest.mark.parametrize("chain", CHAINS, ids="-".join)
def test_in_any_bands(
    chain: list[str], band_bytes: int, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_recipe, "BAND_BYTES", band_bytes)
    weight, change = _draw(OUT, IN), Change()
    steps = tuple(_step(method) for method in chain)
    stored = weight.t().contiguous() if transposed else weight
    recipe = Fold(Value(stored), steps, transposed, torch.float32, "up", change=change)
    expected = _folded(weight, steps)
    found = recipe.evaluate().t() if transposed else recipe.evaluate()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
    rows, columns = (13, 40), (3, 29)
    part = recipe.part((columns, rows) if transposed else (rows, columns))
    torch.testing.assert_close(part.t() if transposed else part, found[13:40, 3:29])
    ratio = float((expected - weight.double()).norm() / weight.double().norm())
    assert change.report() == {"up": pytest.approx(ratio, rel=6e-3)}
    by_rows = all(METHODS[method].additive for method in chain)
    assert (recipe.cuts(0), recipe.cuts(1)) == ((by_rows, True) if transposed else (True, by_rows))


def test_stacked_weights_are_folded_one_by_one() -> None:
    weights, change = _draw(3, OUT, IN), Change()
    steps = [
        FoldStep("lora", LowRank(_draw(2, IN), _draw(OUT, 2), float(n)), "a") for n in range(3)
    ]
    base = Value(weights)
    stack = Stack(
        tuple(
            Fold(Entry(base, n), (step,), False, torch.float32, "up", change=change, number=n)
            for n, step in enumerate(steps)
        )
    )
    expected = torch.stack([_folded(w, (s,)) for w, s in zip(weights, steps, strict=True)])
    assert stack.shape == (3, OUT, IN)
    torch.testing.assert_close(stack.evaluate().double(), expected, rtol=1e-6, atol=1e-6)
    ratio = float((expected - weights.double()).norm() / weights.double().norm())
    assert change.report() == {"up": pytest.approx(ratio, rel=6e-3)}
    part = stack.part(((1, 3), (5, 70), (0, 11)))
    torch.testing.assert_close(part.double(), expected[1:3, 5:70, :11], rtol=1e-6, atol=1e-6)
    assert stack.cuts(0)
    assert stack.cuts(1)
    assert list(stack.inputs()[0].inputs()[0].inputs()) == [base]


def test_replaced_rows() -> None:
    table, rows = _draw(30, 8), _draw(3, 8)
    recipe = ReplacedRows(Value(table), (7, 0, 29), rows)
    expected = table.clone()
    expected[[7, 0, 29]] = rows
    assert torch.equal(recipe.evaluate(), expected)
    assert torch.equal(recipe.part(((5, 30), (2, 6))), expected[5:, 2:6])
    assert recipe.describe().endswith("-> replace 3 rows")
