"""Parts of a constant are the whole one's, however it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from bone_fx.weights.recipes import fold_recipe
from bone_fx.weights.recipes import recipe as recipes
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import Cast, Concat, Converted, Read, Recipe, Transpose, Value
from bone_fx.weights.storage.boxes import Box, bands, whole, within
from bone_fx.weights.storage.safetensors_file import read_header
from tests.adapters.test_methods import make


@given(
    start=st.integers(0, 20),
    length=st.integers(0, 50),
    columns=st.integers(1, 9),
    nbytes=st.integers(1, 500),
    grain=st.integers(1, 7),
)
def test_bands_cover_a_box(start: int, length: int, columns: int, nbytes: int, grain: int) -> None:
    box = ((start, start + length), (3, 3 + columns))
    cut = list(bands(box, nbytes, 4, grain=grain))
    rows = [row for (first, last), _ in cut for row in range(first, last)]
    assert rows == list(range(start, start + length))
    assert all(band[1] == box[1] for band in cut)
    assert all(first % grain == 0 for (first, _), _ in cut[1:])
    assert all((b - a) * columns * 4 <= max(nbytes, grain * columns * 4) for (a, b), _ in cut)


def recipes_to_cut(folder: Path) -> dict[str, Recipe]:
    generator = torch.Generator().manual_seed(0)
    cube = torch.randn(6, 5, 7, generator=generator)
    weight, bone = make("bone", 50, 80, 16, torch.float32)
    _, mini = make("mini", 50, 80, 16, torch.float32)
    square, bat = make("bat", 48, 80, 8, torch.float32)
    _, other = make("bat", 48, 80, 16, torch.float32)
    save_file({"cube": cube, "w": weight, "half": weight.bfloat16()}, folder / "m.safetensors")
    stored = {
        key: Read(folder / "m.safetensors", key, entry)
        for key, entry in read_header(folder / "m.safetensors").items()
    }
    steps = (FoldStep("bone", bone, "a"), FoldStep("mini", mini, "b"))
    bats = (FoldStep("bat", bat, "a"), FoldStep("bat", other, "b"))
    in_conv1d = Fold(Value(weight.t().contiguous()), steps, True, torch.float16, "site")
    additive = Fold(stored["half"], steps, False, torch.float16, "site")
    return {
        "read": stored["cube"],
        "turned": Transpose(stored["cube"], (2, 0, 1)),
        "cast": Cast(Transpose(stored["w"]), torch.bfloat16),
        "packed": Transpose(Concat((additive, Cast(stored["w"], torch.float16)))),
        "beside": Concat((Value(cube), stored["cube"]), dim=1),
        "conv1d": in_conv1d,
        "bat": Transpose(Fold(Value(square), bats, False, torch.float16, "site")),
        "converted": Converted((stored["w"],), lambda ts: ts[0][:6].clone(), (6, 50), "rows"),
    }


NAMES = ["read", "turned", "cast", "packed", "beside", "conv1d", "bat", "converted"]


@pytest.mark.parametrize("name", NAMES)
def test_a_part_is_the_wholes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipes_to_cut(tmp_path)[name]
    expected = recipe.evaluate()
    for module in (recipes, fold_recipe):
        monkeypatch.setattr(module, "BAND_BYTES", 700)
    assert torch.equal(recipe.evaluate(), expected)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        box = _some_part(recipe.shape, generator)
        slices = within(box, whole(recipe.shape))
        assert torch.equal(recipe.part(box), expected[slices]), box
        strided = torch.zeros(*[2 * s for s in expected[slices].shape], dtype=recipe.dtype)
        target = strided[tuple(slice(None, None, 2) for _ in box)]
        recipe.fill(target, box)
        assert torch.equal(target, expected[slices]), box


def test_scalars_and_empty_constants() -> None:
    assert Value(torch.tensor(3.0)).part(()) == 3.0
    assert Value(torch.zeros(0, 4)).evaluate().shape == (0, 4)


def _some_part(shape: tuple[int, ...], generator: torch.Generator) -> Box:
    def span(size: int) -> tuple[int, int]:
        ends: Tensor = torch.randint(0, size + 1, (2,), generator=generator)
        return int(ends.min()), int(ends.max())

    return tuple(span(size) for size in shape)
