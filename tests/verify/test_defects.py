"""Verification catches defects that are seeded into a build: exit 6, nothing published, the build
kept as rejected."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from bone_fx.cli import main
from bone_fx.deploy import builds as building
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.fold_recipe import Fold
from bone_fx.weights.recipes.recipe import Concat, Recipe, Transpose, cast
from tests.end_to_end.tiny import tiny_adapter, tiny_base

QKV = "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")


def run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["bone-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def seed(monkeypatch: pytest.MonkeyPatch, damage: Callable[[ir.Model], None]) -> None:
    """Damage every model between its translation and its writing."""
    honest = building.build_checkpoint

    def damaged(*args: Any, **kwargs: Any) -> Any:
        build = honest(*args, **kwargs)
        damage(build.model)
        return build

    monkeypatch.setattr(building, "build_checkpoint", damaged)


def damage_packed(
    model: ir.Model, change: Callable[[tuple[Recipe, ...]], tuple[Recipe, ...]]
) -> None:
    """Change the parts that a layer's packed q, k and v are made of."""
    value = model.graph.initializers[QKV]
    transposed = recipe_of(value)
    assert isinstance(transposed, Transpose)
    packed = transposed.recipe
    assert isinstance(packed, Concat)
    parts = change(packed.recipes)
    set_recipe(value, Transpose(Concat(parts, packed.dim), transposed.permutation))


def leave_a_site_unfolded(model: ir.Model) -> None:
    def unfold(parts: tuple[Recipe, ...]) -> tuple[Recipe, ...]:
        first, *others = parts
        assert isinstance(first, Fold)
        return (cast(first.base, first.dtype), *others)

    damage_packed(model, unfold)


def swap_q_and_k(model: ir.Model) -> None:
    damage_packed(model, lambda parts: (parts[1], parts[0], *parts[2:]))


def ignore_the_mask(model: ir.Model) -> None:
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    total = next(node for node in model.graph if node.op_type == "ReduceSum")
    shape = ir.node("Shape", [mask])
    one = ir.tensor(np.array([1], dtype=np.int64))
    ones = ir.node("ConstantOfShape", [shape.outputs[0]], attributes={"value": one})
    model.graph.insert_before(total, [shape, ones])
    total.replace_input_with(0, ones.outputs[0])


def shift_the_past(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Sub")
    one = node.inputs[1]
    assert one is not None
    assert one.const_value is not None
    two = ir.Value(name="two", const_value=ir.tensor(one.const_value.numpy() + 1, name="two"))
    model.graph.initializers["two"] = two
    node.replace_input_with(1, two)


@pytest.mark.parametrize(
    "damage", [leave_a_site_unfolded, swap_q_and_k, ignore_the_mask, shift_the_past]
)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_defect_is_caught(
    damage: Callable[[ir.Model], None],
    dtype: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = folders
    out = tmp_path / "out"
    assert (
        run([base, "--adapter", adapter, "-o", tmp_path / "honest", "--dtype", dtype], monkeypatch)
        == 0
    )
    seed(monkeypatch, damage)
    assert run([base, "--adapter", adapter, "-o", out, "--dtype", dtype], monkeypatch) == 6
    assert not out.exists()
    assert (tmp_path / "out.rejected" / "model.onnx").exists()
    assert "verification failed" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*staging*"))


def test_activations_that_overflow_fp16_are_caught(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = folders
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if name.endswith(("up_proj.weight", "gate_proj.weight")):
            weights[name] *= 3e3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert max(float(w.abs().max()) for w in weights.values()) < torch.finfo(torch.float16).max
    assert run([base, "--adapter", adapter, "-o", tmp_path / "wide"], monkeypatch) == 0
    assert (
        run([base, "--adapter", adapter, "-o", tmp_path / "out", "--dtype", "fp16"], monkeypatch)
        == 6
    )
    assert "mlp.down_proj overflows fp16" in capsys.readouterr().err


def test_weights_that_overflow_fp16_are_named(
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, adapter = folders
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert (
        run([base, "--adapter", adapter, "-o", tmp_path / "out", "--dtype", "fp16"], monkeypatch)
        == 6
    )
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().err
