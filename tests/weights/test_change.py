"""How far adapters move a weight: against the definition, for every method and in any bands."""

from __future__ import annotations

import pytest
import torch

from bone_fx.adapters import METHODS
from bone_fx.weights.recipes import fold_recipe
from bone_fx.weights.recipes.change import Change
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import Value

OUT, IN, R = 80, 48, 16
CHAINS = {
    "bone": ["bone"],
    "ragged": ["ragged"],
    "mini": ["mini"],
    "bat": ["bat"],
    "bone and bat": ["bone", "bat"],
    "bone twice": ["bone", "ragged"],
}


def step(kind: str) -> FoldStep:
    generator = torch.Generator().manual_seed(len(kind))
    method = {"ragged": "bone"}.get(kind, kind)
    shape = METHODS[method].block_shape(IN, OUT, 20 if kind == "ragged" else R, 20)
    return FoldStep(method, 0.1 * torch.randn(shape, generator=generator), kind)


@pytest.mark.parametrize("band_bytes", [2 << 20, IN * 4 * R, 512])
@pytest.mark.parametrize("chain", CHAINS)
def test_it_is_the_definition(chain: str, band_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_recipe, "BAND_BYTES", band_bytes)
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    change = Change()
    steps = tuple(step(kind) for kind in CHAINS[chain])
    recipe = Fold(Value(weight), steps, False, torch.float16, "up_proj", change=change)
    recipe.evaluate()
    folded = weight.double()
    for each in steps:
        folded = METHODS[each.method].fold(folded, each.block.double())
    ratio = float((folded - weight.double()).norm() / weight.double().norm())
    assert change.report() == {"up_proj": pytest.approx(ratio, rel=6e-3)}


def test_a_weight_of_zeros_has_no_ratio() -> None:
    change = Change()
    Fold(
        Value(torch.zeros(OUT, IN)), (step("bone"),), False, torch.float32, "up", change=change
    ).evaluate()
    assert change.report() == {"up": None}
