"""What a cast costs an adapter: against the definition, in any order, with a name that helps."""

from __future__ import annotations

import pytest
import torch

from bone_fx.weights.recipes import fold_recipe
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import Transpose, Value
from bone_fx.weights.recipes.rounding import Rounding


def folded(scale: float, to: torch.dtype, rounding: Rounding) -> tuple[Fold, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(80, 48, generator=generator)
    block = torch.randn(16, 80, generator=generator) * scale
    recipe = Fold(Value(weight), (FoldStep("bone", block, "a"),), False, to, "up_proj", rounding)
    return recipe, weight


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.002, 1e-5])
def test_the_share_is_the_definition(
    to: torch.dtype, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold_recipe, "_SAMPLED", 1)
    rounding = Rounding(to)
    recipe, weight = folded(scale, to, rounding)
    result = recipe.evaluate()
    effect = recipe.steps[0].block[torch.arange(48) % 16].t().double()
    survived = (result.float() - weight.to(to).float()).double()
    share = 1 - ((survived - effect).norm() / effect.norm()) ** 2
    assert rounding.shares()["up_proj"] == pytest.approx(max(0.0, float(share)), abs=2e-3)
    poor = share < 0.9
    assert bool(rounding.warnings()) == poor
    if poor:
        (warning,) = rounding.warnings()
        assert "1 of 1 adapted layers" in warning
        assert "up_proj" in warning
        assert ("fp16 keeps more" if to == torch.bfloat16 else "fp32 keeps more") in warning


def test_the_order_of_the_parts_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_recipe, "BAND_BYTES", 48 * 4 * 7)
    monkeypatch.setattr(fold_recipe, "_SAMPLED", 1)
    found = []
    for step in (1, -1):
        rounding = Rounding(torch.float16)
        recipe, _ = folded(0.002, torch.float16, rounding)
        for start in list(range(0, 48, 12))[::step]:
            Transpose(recipe).part(((start, start + 12), (0, 80)))
        found.append(rounding.shares())
    assert found[0] == found[1]


def test_other_casts_are_not_measured() -> None:
    rounding = Rounding(torch.bfloat16)
    recipe, _ = folded(0.002, torch.float32, rounding)
    recipe.evaluate()
    assert rounding.shares() == {}
    assert rounding.warnings() == []
