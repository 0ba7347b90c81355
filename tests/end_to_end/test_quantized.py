"""Quantized exports of a tiny decoder: verified against torch with the weights as written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

import bone_fx
from bone_fx.deploy import builds
from bone_fx.errors import UsageError, VerificationError
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.fold_recipe import Fold
from bone_fx.weights.recipes.quantized import Part, QuantizedWeight
from tests.end_to_end.tiny import tiny_adapter, tiny_base

QKV = "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    top = tmp_path_factory.mktemp("quantized")
    return tiny_base(top / "base"), tiny_adapter(top / "adapter")


@pytest.mark.parametrize(
    ("choices", "tolerance"),
    [
        ({"dtype": "int4"}, 1e-4),
        ({"dtype": "int4", "symmetric": True, "head": "int4", "embeddings": "int8"}, 1e-4),
        (
            {"dtype": "int8", "provider": "cuda", "verify_on": "cpu", "head": "keep"}
            | {"block_size": 16},  # 48 and 80 inputs are no multiples of 32
            2e-2,
        ),
    ],
)
def test_export_equals_torch_with_its_weights(
    choices: dict[str, Any], tolerance: float, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    result = bone_fx.export(folders[0], output=tmp_path / "out", adapters=[folders[1]], **choices)
    figures = result.manifest["verification"]["figures"]
    assert figures["onnx_vs_written"] <= tolerance
    assert figures["onnx_vs_folded"] > figures["onnx_vs_written"]
    assert result.manifest["operators"]["com.microsoft::MatMulNBits"] >= 10
    assert result.manifest["quantization"]["products"] >= 10
    assert [each.name for each in (tmp_path / "out").glob("*.onnx")] == ["model.onnx"]


def test_weights_that_do_not_fit_are_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = bone_fx.export(folders[0], output=tmp_path / "out", dtype="int4", block_size=32)
    # 48 and 80 inputs are no multiples of 32.
    assert "com.microsoft::MatMulNBits" not in result.manifest["operators"]
    assert any(QKV in warning for warning in result.warnings)


def test_unknown_block_size(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="block_size=24"):
        bone_fx.export(folders[0], output=tmp_path / "out", dtype="int4", block_size=24)


def part_of(model: ir.Model, name: str) -> Part:
    recipe = recipe_of(model.graph.initializers[name])
    assert isinstance(recipe, Part)
    return recipe


def leave_a_site_unfolded(model: ir.Model) -> None:
    weight = part_of(model, f"{UP}.codes").weight
    assert isinstance(weight.source, Fold)
    base = QuantizedWeight(weight.source.base, weight.scheme)
    for name in ("codes", "scales", "zero_points"):
        set_recipe(model.graph.initializers[f"{UP}.{name}"], base.part(name))


def swap_layers(model: ir.Model) -> None:
    for name in ("codes", "scales", "zero_points"):
        one = model.graph.initializers[f"{QKV}.{name}"]
        other = model.graph.initializers[f"{QKV.replace('.1.', '.0.')}.{name}"]
        first, second = recipe_of(one), recipe_of(other)
        assert first is not None
        assert second is not None
        set_recipe(one, second)
        set_recipe(other, first)


def cross_two_products(model: ir.Model) -> None:
    """The graph reads each product's weight in the other's place."""
    up = next(n for n in model.graph if any(i and i.name == f"{UP}.codes" for i in n.inputs))
    gate_name = f"{UP.replace('up_proj', 'gate_proj')}.codes"
    gate = next(n for n in model.graph if any(i and i.name == gate_name for i in n.inputs))
    for place in (1, 2, 3):
        one, other = up.inputs[place], gate.inputs[place]
        up.replace_input_with(place, other)
        gate.replace_input_with(place, one)


@pytest.mark.parametrize("damage", [leave_a_site_unfolded, swap_layers, cross_two_products])
def test_defects_are_caught(
    damage: Callable[[ir.Model], None],
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = builds.build_checkpoint

    def damaged(*args: Any, **kwargs: Any) -> builds.CheckpointBuild:
        build = honest(*args, **kwargs)
        damage(build.model)
        return build

    monkeypatch.setattr(builds, "build_checkpoint", damaged)
    with pytest.raises(VerificationError):
        bone_fx.export(
            folders[0],
            output=tmp_path / "out",
            adapters=[folders[1]],
            dtype="int4",
            embeddings="keep",
        )
    assert not (tmp_path / "out").exists()


def test_bf16_is_verified_on_a_twin(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = bone_fx.export(
        folders[0],
        output=out,
        adapters=[folders[1]],
        dtype="bf16",
        provider="cuda",
        verify_on="cpu",
    )
    model = ir.load(out / "model.onnx")
    assert model.graph.outputs[0].dtype == ir.DataType.BFLOAT16
    assert result.manifest["verification"]["figures"]["onnx_vs_written"] <= 1e-4
    assert any("fp32 twin" in note for note in result.manifest["notes"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
