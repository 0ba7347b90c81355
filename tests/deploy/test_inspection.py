"""`bone-export inspect`: figures against PyTorch's; adapters that are refused are shown."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bone_fx.deploy.inspection import as_lines, inspect_adapter
from bone_fx.errors import AdapterError
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_base(folder / "base")
    tiny_adapter(folder / "adapter", modules_to_save=["norm"])
    tensors = load_file(folder / "adapter" / WEIGHTS)
    tensors["base_model.model.model.norm.weight"] = torch.full((48,), 2.0)
    save_file(tensors, folder / "adapter" / WEIGHTS)
    (folder / "adapter" / "optimizer.pt").write_bytes(b"12345")
    (folder / "adapter" / "modeling.py").write_text("raise SystemExit")
    return folder


def test_figures_are_those_of_the_tensors(inputs: Path) -> None:
    done = run("inspect", inputs / "adapter", "--base", inputs / "base", "--json")
    assert done.returncode == 0, done.stderr
    view = json.loads(done.stdout)
    blocks = load_file(inputs / "adapter" / WEIGHTS)
    weights = load_file(inputs / "base" / "model.safetensors")
    assert len(view["blocks"]) == 6
    for row in view["blocks"]:
        block = blocks[f"base_model.model.{row['name']}.bone_block"]
        weight = weights[f"{row['name']}.weight"]
        delta = block[torch.arange(weight.shape[1]) % 16].t()
        assert row["shape"] == list(block.shape)
        assert row["norm"] == pytest.approx(float(block.norm()), rel=6e-3)
        assert row["change"] == pytest.approx(float(delta.norm() / weight.norm()), rel=6e-3)
        assert (row["out_features"], row["in_features"]) == tuple(weight.shape)
    [saved] = view["saved"]
    assert (saved["name"], saved["norm"]) == ("model.norm.weight", pytest.approx(13.9))
    assert (view["method"], view["config"]["r"], view["refused"]) == ("bone", 16, [])
    assert (view["base"]["adapted"], view["base"]["layers"]) == (6, 15)
    uses = {file["name"]: (file["bytes"], file["use"]) for file in view["files"]}
    assert uses["optimizer.pt"] == (5, "not used")
    assert "neither run nor copied" in uses["modeling.py"][1]


def test_layers_of_a_site_share_a_line(inputs: Path) -> None:
    done = run("inspect", "-q", inputs / "adapter")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    [line] = [line.split() for line in lines if "up_proj" in line and "layers" in line]
    assert line[:4] == ["model.layers.*.mlp.up_proj", "2", "[16,", "80]"]
    assert "nothing would be refused; pass --base to see how it fits a model" in lines


def lora(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')


def damaged(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\x10" + (folder / WEIGHTS).read_bytes()[1:])


def without_tensors(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def not_finite(folder: Path) -> None:
    tensors = {key: tensor * float("nan") for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def no_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": NaN, "peft_type": ["BONE"]')


def odd_values(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"r": NaN, "peft_type": {"a": [1]}}')


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def link_outside(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("/etc/hostname")


def other_width(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: tensor[:, :40].clone() for key, tensor in tensors.items()}, folder / WEIGHTS)


REFUSED = (lora, damaged, without_tensors, not_finite, no_json, odd_values, pipe, link_outside)


@pytest.mark.parametrize("damage", [*REFUSED, other_width], ids=lambda f: f.__name__)
def test_what_would_be_refused_is_said_and_the_rest_shown(
    damage: Any, inputs: Path, tmp_path: Path
) -> None:
    tiny_adapter(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    base = ("--base", inputs / "base") if damage is other_width else ()
    done = run("inspect", tmp_path / "adapter", *base, "--json")
    assert done.returncode == 3, done.stderr
    view = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    [refusal] = view["refused"]
    assert refusal["exit_code"] == 3
    export = run(inputs / "base", "--adapter", tmp_path / "adapter", "-o", tmp_path / "out")
    assert refusal["message"].splitlines()[0] in export.stderr
    assert {file["name"] for file in view["files"]} >= {"adapter_config.json"}
    assert refusal["message"].splitlines()[0] in "\n".join(as_lines(view))


def test_names_cannot_pass_for_lines_of_ours(tmp_path: Path) -> None:
    tiny_adapter(tmp_path / "adapter", base_model_name_or_path="a\nrefused  (exit 0)\x1b[31m")
    done = run("inspect", tmp_path / "adapter")
    assert "\x1b" not in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("refused")]


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="nowhere"):
        inspect_adapter(tmp_path / "nowhere")
    assert run("inspect", tmp_path / "nowhere", "--json").returncode == 3
