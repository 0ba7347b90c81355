"""Each kind of recipe: shape and dtype known beforehand, the same when evaluated, described in one
line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bone_fx.errors import BaseModelError, FoldError
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import (
    Cast,
    Concat,
    Converted,
    Read,
    Recipe,
    Transpose,
    Value,
    cast,
    without_cast,
)
from bone_fx.weights.storage.safetensors_file import read_header
from tests.adapters.test_methods import make, slow_fold


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Read]:
    """Three tensors in a file: a matrix, a bfloat16 matrix and a cube."""
    tensors = {
        "w": torch.randn(6, 4),
        "half": torch.randn(3, 4).bfloat16(),
        "cube": torch.randn(2, 3, 5),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    return {key: Read(file, key, entry) for key, entry in read_header(file).items()}


def _evaluated(recipe: Recipe) -> Tensor:
    value = recipe.evaluate()
    assert value.is_contiguous()
    assert (tuple(value.shape), value.dtype) == (recipe.shape, recipe.dtype)
    assert torch.equal(value, recipe.evaluate())
    return value


def test_steps(stored: dict[str, Read]) -> None:
    w, half, cube = (_evaluated(stored[key]) for key in ("w", "half", "cube"))
    assert torch.equal(_evaluated(Transpose(stored["w"])), w.t())
    assert torch.equal(_evaluated(Transpose(stored["cube"], (2, 0, 1))), cube.permute(2, 0, 1))
    assert torch.equal(_evaluated(Cast(stored["half"], torch.float16)), half.half())
    joined = Concat((stored["w"], Cast(stored["half"], torch.float32)))
    assert torch.equal(_evaluated(joined), torch.cat([w, half.float()]))
    assert torch.equal(
        _evaluated(Concat((stored["cube"], stored["cube"]), dim=2)), torch.cat([cube, cube], 2)
    )
    assert torch.equal(_evaluated(Value(w.t())), w.t())
    rows = Converted((stored["w"],), lambda tensors: tensors[0][:2], (2, 4), "first rows")
    assert torch.equal(_evaluated(rows), w[:2])


def test_one_line_says_it_all(stored: dict[str, Read]) -> None:
    step = FoldStep("bone", torch.zeros(2, 6), "default")
    recipe = Transpose(Fold(stored["w"], (step,), False, torch.float16, "up_proj"))
    assert (
        recipe.describe()
        == "read model.safetensors:w -> fold bone(default) -> cast float16 -> transpose"
    )
    assert Value(torch.zeros(2), "computed").describe() == "computed float32[2]"


def test_order_is_the_files(stored: dict[str, Read]) -> None:
    recipes = [Value(torch.zeros(1)), *(Transpose(r) for r in stored.values() if len(r.shape) == 2)]
    in_order = sorted(recipes, key=lambda recipe: recipe.order())
    offsets = [read.entry.offset for recipe in in_order for read in recipe.reads()]
    assert offsets == sorted(offsets)
    assert isinstance(in_order[-1], Value)


def test_casts_come_off(stored: dict[str, Read]) -> None:
    read = stored["half"]
    assert cast(read, torch.bfloat16) is read
    assert without_cast(Cast(Cast(read, torch.float32), torch.float16)) is read


def test_misfits_speak_up(stored: dict[str, Read]) -> None:
    with pytest.raises(ValueError, match="concatenate"):
        Concat((stored["w"], stored["half"]))
    with pytest.raises(ValueError, match="permute"):
        Transpose(stored["cube"])
    with pytest.raises(BaseModelError, match="another tensor"):
        Converted((stored["w"],), lambda tensors: tensors[0], (4, 6), "nothing").evaluate()


@pytest.mark.parametrize("method", ["bone", "mini", "bat"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fold_is_the_definition_rounded_once(
    method: str, transposed: bool, dtype: torch.dtype
) -> None:
    w, block = make(method, 48, 80, 16, torch.float32)
    w = w.to(dtype)
    base = Value((w.t() if transposed else w).contiguous())
    folded = _evaluated(Fold(base, (FoldStep(method, block, "a"),), transposed, dtype, "site"))
    exact = slow_fold(method, w.double(), block.double())
    result = (folded.t() if transposed else folded).double()
    # One rounding of a float32 result: at most the two neighbours of the exact value differ, by one
    # unit in the last place.
    unit = max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
    assert ((result - exact).abs() <= unit * exact.abs().clamp(min=1)).all()
    if method != "bat":
        assert torch.equal(result, (w.float() + (exact - w.double()).float()).to(dtype).double())


def test_chained_blocks_act_in_order() -> None:
    w, first = make("bat", 48, 80, 16, torch.float32)
    _, second = make("bat", 48, 80, 8, torch.float32)
    steps = (FoldStep("bat", first, "a"), FoldStep("bat", second, "b"))
    folded = Fold(Value(w), steps, False, torch.float32, "site").evaluate()
    expected = slow_fold("bat", slow_fold("bat", w.double(), first.double()), second.double())
    torch.testing.assert_close(folded.double(), expected, rtol=1e-5, atol=1e-5)
    swapped = Fold(Value(w), steps[::-1], False, torch.float32, "site").evaluate()
    assert (swapped - folded).abs().max() > 0.01


@pytest.mark.parametrize(
    ("weight", "block", "dtype", "blame"),
    [
        (1.0, float("nan"), torch.float32, "block of adapter 'tuned'"),
        (float("inf"), 1.0, torch.float32, "base weight"),
        (3e38, 3e38, torch.float32, "overflow"),
        (6e4, 6e4, torch.float16, "1.2e"),
    ],
)
def test_values_that_are_not_finite(
    weight: float, block: float, dtype: torch.dtype, blame: str
) -> None:
    step = FoldStep("bone", torch.full((2, 6), block), "tuned")
    recipe = Fold(
        Value(torch.full((6, 4), weight)), (step,), False, dtype, "model.layers.3.up_proj"
    )
    with pytest.raises(FoldError, match=r"model\.layers\.3\.up_proj") as caught:
        recipe.evaluate()
    assert blame in str(caught.value.found)
