"""Verification catches defects that are seeded into a build: exit 6, nothing published, the build
kept as rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import bone_fx
from bone_fx.deploy import builds
from bone_fx.errors import VerificationError
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.fold_recipe import Fold
from bone_fx.weights.recipes.recipe import Concat, Recipe, Transpose, cast
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base, tiny_tokenizer

QKV = "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")


class Honest(NamedTuple):
    """An export that passed: its arguments, and its build as it was before it was written."""

    arguments: list[object]
    build: builds.CheckpointBuild

    def copy(self) -> builds.CheckpointBuild:
        """The build over a copy of its model, whose initializers are the same recipes."""
        return replace(self.build, model=self.build.model.clone())


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def honest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Honest:
    folder = tmp_path_factory.mktemp(request.param)
    base, adapter = tiny_base(folder / "base"), tiny_adapter(folder / "adapter")
    arguments = [base, "--adapter", adapter, "--dtype", request.param]
    build_checkpoint, kept = builds.build_checkpoint, []

    def build(*args: Any, **kwargs: Any) -> builds.CheckpointBuild:
        built = build_checkpoint(*args, **kwargs)
        kept.append(Honest(arguments, built).copy())
        return built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builds, "build_checkpoint", build)
        done = run(*arguments, "-o", folder / "honest")
    assert done.returncode == 0, done.stderr
    return Honest(arguments, *kept)


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
def test_a_defect_is_caught(
    damage: Callable[[ir.Model], None],
    honest: Honest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    build = honest.copy()
    damage(build.model)
    monkeypatch.setattr(builds, "build_checkpoint", lambda *_args, **_kwargs: build)
    done = run(*honest.arguments, "-o", out)
    assert done.returncode == 6
    assert not out.exists()
    assert (tmp_path / "out.rejected" / "model.onnx").exists()
    assert "verification failed" in done.stderr
    assert not list(tmp_path.glob(".*staging*"))


def test_activations_that_overflow_fp16_are_caught(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    base, adapter = folders
    weights = load_file(base / "model.safetensors")
    for name in weights:
        if name.endswith(("up_proj.weight", "gate_proj.weight")):
            weights[name] *= 3e3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert max(float(w.abs().max()) for w in weights.values()) < torch.finfo(torch.float16).max
    assert run(base, "--adapter", adapter, "-o", tmp_path / "wide").returncode == 0
    done = run(base, "--adapter", adapter, "-o", tmp_path / "out", "--dtype", "fp16")
    assert done.returncode == 6
    assert "mlp.down_proj overflows fp16" in done.stderr


def test_weights_that_overflow_fp16_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    weights = load_file(base / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    done = run(base, "--adapter", adapter, "-o", tmp_path / "out", "--dtype", "fp16")
    assert done.returncode == 6
    assert "model.layers.1.mlp.down_proj" in done.stderr


def test_a_real_text_is_held_to_the_range_of_fp16(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=128, n_positions=300, n_embd=32, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    place = 250  # beyond the cases' lengths: only a text comes here from its beginning
    model.transformer.wpe.weight.data[place, 0] = torch.finfo(torch.float16).max
    model.transformer.wte.weight.data[:, 0] = 100
    model.save_pretrained(tmp_path / "base")
    bone_fx.export(tmp_path / "base", output=tmp_path / "without a text", dtype="fp16")
    tiny_tokenizer(tmp_path / "base")
    with pytest.raises(VerificationError, match="overflows fp16"):
        bone_fx.export(tmp_path / "base", output=tmp_path / "out", dtype="fp16")
