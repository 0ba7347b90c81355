"""Folding recipes: PEFT's merged weights, the bytes of the eager fold, and adapters that do not
fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bone_fx.adapter_folder import AdapterFolder, read_adapter
from bone_fx.adapters import METHODS, TRAINED
from bone_fx.base.loading import open_base, skeleton
from bone_fx.config import BoneConfig
from bone_fx.errors import AdapterError
from bone_fx.sites import LinearSite
from bone_fx.weights.apply_adapters import fold_recipes
from bone_fx.weights.load_plan import recipes_for
from bone_fx.weights.recipes.fold_recipe import Fold
from bone_fx.weights.recipes.recipe import Recipe, Value
from tests.capture.architectures import BY_NAME
from tests.weights.checkpoints import save

ORACLE = Path(__file__).parents[1] / "oracle"
EXPECTED = sorted(file for file in ORACLE.glob("*/expected*.safetensors"))


def _sites(model: nn.Module, names: set[str]) -> dict[str, LinearSite]:
    sites = {}
    for name in sorted(names):
        weight = model.get_submodule(name).get_parameter("weight")
        transposed = type(model.get_submodule(name)).__name__ == "Conv1D"
        out_features, in_features = reversed(weight.shape) if transposed else weight.shape
        sites[name] = LinearSite(name, f"{name}.weight", in_features, out_features, transposed)
    return sites


@pytest.mark.parametrize("file", EXPECTED, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_gives_the_weights_that_peft_merged(file: Path) -> None:
    case = json.loads((file.parent / "case.json").read_text())
    active = next(row["active"] for row in case["expected"] if row["file"] == file.name)
    adapters = [(name, read_adapter(file.parent / case["adapters"][name], name)) for name in active]
    base = open_base(file.parent / "base")
    model, plan = skeleton(base, torch.float32)
    extra = {
        name: tensor for _, adapter in adapters for name, tensor in adapter.modules_to_save.items()
    }
    recipes = recipes_for(model, plan, base.tensors, extra=extra)
    sites = _sites(model, {name for _, adapter in adapters for name in adapter.blocks})
    folded = fold_recipes(recipes, sites, adapters)
    merged = {
        k.removeprefix("merged."): v for k, v in load_file(file).items() if k.startswith("merged.")
    }
    assert merged
    for name, expected in merged.items():
        torch.testing.assert_close(folded[name].evaluate(), expected, rtol=1e-6, atol=1e-6)
    changed = {name for name in recipes if folded[name] is not recipes[name]}
    assert changed == {site.weight_name for site in sites.values()}


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_bytes_as_the_fold_of_tensors(
    method: str, architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    save(BY_NAME[architecture], tmp_path)
    base = open_base(tmp_path)
    model, plan = skeleton(base, dtype)
    recipes = recipes_for(model, plan, base.tensors)
    names = {
        n
        for n, m in model.named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and ".1." in n
    }
    sites = _sites(model, names)
    adapter = _adapter(method, sites)
    folded = fold_recipes(recipes, sites, [("tuned", adapter)])
    real = base.architecture.from_pretrained(tmp_path).state_dict()
    for name, site in sites.items():
        w_OI = real[site.weight_name].t() if site.transposed else real[site.weight_name]
        eager = METHODS[method].fold(w_OI, adapter.blocks[name]).to(dtype)
        result = folded[site.weight_name].evaluate()
        assert torch.equal(result.t() if site.transposed else result, eager), name


def test_folds_from_the_stored_bytes(tmp_path: Path) -> None:
    """A float16 export of a float32 base rounds once, after the fold."""
    weight = torch.tensor([[1.0 + 2.0**-11 + 2.0**-20]])
    base: dict[str, Recipe] = {"l.weight": Value(weight)}
    from bone_fx.weights.recipes.recipe import cast

    rounded = {"l.weight": cast(base["l.weight"], torch.float16)}
    site = LinearSite("l", "l.weight", 1, 1)
    adapter = _adapter("bone", {"l": site}, r=1)
    adapter.blocks["l"] = torch.tensor([[-1.0]])
    folded = fold_recipes(rounded, {"l": site}, [("a", adapter)])["l.weight"].evaluate()
    assert folded.item() == pytest.approx(2.0**-11 + 2.0**-20, rel=1e-3)


def _adapter(method: str, sites: dict[str, LinearSite], r: int = 8) -> AdapterFolder:
    init: Any = {"bone": True, "bat": "bat", "mini": "mini"}[method]
    config = BoneConfig(
        r=r,
        init_weights=init,
        target_modules=sorted(sites),
        **({"mini_r": 4} if method == "mini" else {}),
    )
    generator = torch.Generator().manual_seed(5)
    blocks: dict[str, Tensor] = {}
    for name, site in sites.items():
        shape = METHODS[method].block_shape(
            site.in_features, site.out_features, config.r, config.mini_r
        )
        blocks[name] = 0.1 * torch.randn(shape, generator=generator)
    return AdapterFolder(Path("adapter"), config, blocks, {})


@pytest.fixture
def layer() -> tuple[dict[str, Recipe], dict[str, LinearSite]]:
    """One layer I=48, O=80 and its site."""
    return {"up.weight": Value(torch.randn(80, 48))}, {"up": LinearSite("up", "up.weight", 48, 80)}


def test_several_adapters(layer: tuple[dict[str, Recipe], dict[str, LinearSite]]) -> None:
    recipes, sites = layer
    adapters = [("a", _adapter("bone", sites)), ("b", _adapter("bat", sites))]
    recipe = fold_recipes(recipes, sites, adapters)["up.weight"]
    assert isinstance(recipe, Fold)
    assert recipe.describe().endswith("-> fold bone(a) -> fold bat(b)")


def test_block_without_site(layer: tuple[dict[str, Recipe], dict[str, LinearSite]]) -> None:
    recipes, sites = layer
    adapter = _adapter("bone", sites)
    adapter.blocks["down"] = torch.zeros(8, 48)
    with pytest.raises(AdapterError, match="down"):
        fold_recipes(recipes, sites, [("a", adapter)])


def test_site_without_block(layer: tuple[dict[str, Recipe], dict[str, LinearSite]]) -> None:
    recipes, sites = layer
    adapter = _adapter("bone", sites)
    adapter.blocks.clear()
    with pytest.raises(AdapterError, match="expected: a block for up"):
        fold_recipes(recipes, sites, [("a", adapter)])


def test_block_of_another_shape(layer: tuple[dict[str, Recipe], dict[str, LinearSite]]) -> None:
    recipes, sites = layer
    adapter = _adapter("bone", sites)
    adapter.blocks["up"] = torch.zeros(8, 72)
    with pytest.raises(AdapterError, match="up has the wrong shape") as caught:
        fold_recipes(recipes, sites, [("a", adapter)])
    assert caught.value.expected == "one for a layer 48 -> 80"
    assert caught.value.found == "shape [8, 72] in place of [8, 80] for bone with r=8"


def test_bat_that_cannot_fit() -> None:
    site = LinearSite("up", "up.weight", 50, 80)
    adapter = _adapter("bat", {"up": LinearSite("up", "up.weight", 48, 80)}, r=16)
    with pytest.raises(AdapterError, match="must divide"):
        fold_recipes({"up.weight": Value(torch.randn(80, 50))}, {"up": site}, [("a", adapter)])


def test_tied_weight_is_refused() -> None:
    shared = Value(torch.randn(80, 48))
    site = LinearSite("lm_head", "lm_head.weight", 48, 80)
    recipes: dict[str, Recipe] = {"embed.weight": shared, "lm_head.weight": shared}
    with pytest.raises(AdapterError, match=r"tied to embed\.weight"):
        fold_recipes(recipes, {"lm_head": site}, [("a", _adapter("bone", {"lm_head": site}))])
