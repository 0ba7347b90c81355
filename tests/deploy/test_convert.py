"""Converted adapters: PEFT computes with them what it computed with the adapter."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertForSequenceClassification

import bone_fx
from bone_fx.errors import AdapterError, UsageError
from tests.command import run
from tests.train.peft_models import in_peft, llama, peft_config, peft_load

IDS = torch.randint(0, 64, (3, 11), generator=torch.Generator().manual_seed(7))
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")
BLOCKS = ("bone_block", "miss_block", "lora_B")


def trained(folder: Path, model: Any, **fields: Any) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter of PEFT's whose blocks are random, and its logits."""
    model.save_pretrained(folder / "base")
    config = peft.MissConfig(**fields) if "mini_r" in fields else peft_config(**fields)
    wrapped = in_peft(copy.deepcopy(model), config)
    torch.manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if any(end in name for end in BLOCKS) or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.train(mode=False)
    wrapped.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return folder / "base", folder / "adapter", wrapped(input_ids=IDS).logits


def logits(model: Any, adapter: Path) -> torch.Tensor:
    wrapped = peft_load(copy.deepcopy(model), adapter)
    with torch.no_grad():
        result: torch.Tensor = wrapped(input_ids=IDS).logits
    return result


def _mode_of_a_file(folder: Path) -> int:
    (folder / "new").touch()
    return (folder / "new").stat().st_mode & 0o777


def convert(adapter: Path, to: Any, output: Path, **options: Any) -> bone_fx.ConvertResult:
    return bone_fx.convert_adapter(adapter, to=to, output=output, **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 8, "target_modules": ["q_proj", "down_proj"]},
        {"r": 20, "target_modules": "all-linear"},  # a ragged last shard
        {"r": 40, "target_modules": ["k_proj"]},  # wider than the layer
        {"r": 8, "target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"r": 8, "mini_r": 4, "init_weights": "mini", "target_modules": ["v_proj", "up_proj"]},
    ],
    ids=["suffixes", "ragged", "wide", "one layer", "mini"],
)
def test_a_lora_computes_what_the_blocks_do(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = llama()
    base, adapter, expected = trained(tmp_path, model, **fields)
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "optimizer.pt").write_bytes(b"")
    result = convert(adapter, "lora", tmp_path / "lora", base=base)
    assert (result.kind, result.errors) == ("LORA", {})
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "lora").iterdir()}
    assert (
        modes["adapter_model.safetensors"]
        == modes["adapter_config.json"]
        == _mode_of_a_file(tmp_path)
    )
    assert (tmp_path / "lora" / "tokenizer.json").read_text() == "{}"
    assert "not taken along: optimizer.pt" in result.warnings
    torch.testing.assert_close(logits(model, tmp_path / "lora"), expected, rtol=0, atol=1e-5)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    if "layers_to_transform" not in fields and fields["target_modules"] != "all-linear":
        assert config["target_modules"] == sorted(fields["target_modules"])


def test_a_head_that_was_trained_whole_goes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = BertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    config.num_labels = 3
    model = BertForSequenceClassification(config)
    fields = {"r": 8, "target_modules": ["query"], "task_type": "SEQ_CLS"}
    base, adapter, expected = trained(tmp_path, model, **fields)
    convert(adapter, "lora", tmp_path / "lora", base=base)
    torch.testing.assert_close(logits(model, tmp_path / "lora"), expected, rtol=0, atol=1e-5)


def test_bone_and_miss_become_one_another(tmp_path: Path) -> None:
    model = llama()
    _, adapter, expected = trained(tmp_path, model, r=8, target_modules=["q_proj"])
    assert convert(adapter, "miss", tmp_path / "miss").kind == "MISS"
    assert convert(tmp_path / "miss", "bone", tmp_path / "bone").kind == "BONE"
    for name in ("miss", "bone"):
        torch.testing.assert_close(logits(model, tmp_path / name), expected, rtol=0, atol=1e-6)
    one, other = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "bone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_mini_becomes_bone_with_repeated_columns(tmp_path: Path) -> None:
    model = llama()
    fields = {"r": 8, "mini_r": 4, "init_weights": "mini", "target_modules": ["v_proj"]}
    base, adapter, expected = trained(tmp_path, model, **fields)
    with pytest.raises(UsageError, match="--base"):
        convert(adapter, "bone", tmp_path / "bone")
    convert(adapter, "bone", tmp_path / "bone", base=base)
    torch.testing.assert_close(logits(model, tmp_path / "bone"), expected, rtol=0, atol=1e-5)


def test_bat_is_rounded_to_a_rank_that_was_asked_for(tmp_path: Path) -> None:
    model = llama()
    fields = {"r": 8, "init_weights": "bat", "target_modules": ["q_proj"]}
    base, adapter, expected = trained(tmp_path, model, **fields)
    with pytest.raises(UsageError, match="full rank"):
        convert(adapter, "lora", tmp_path / "no", base=base)
    coarse = convert(adapter, "lora", tmp_path / "coarse", base=base, approximate=4)
    whole = convert(adapter, "lora", tmp_path / "whole", base=base, approximate=32)
    assert max(whole.errors.values()) < 1e-5
    torch.testing.assert_close(logits(model, tmp_path / "whole"), expected, rtol=0, atol=1e-5)
    weights = load_file(base / "model.safetensors")
    blocks = load_file(adapter / "adapter_model.safetensors")
    for name, error in coarse.errors.items():
        w_OI, block = weights[f"{name}.weight"], blocks[f"base_model.model.{name}.bone_block"]
        tiles = w_OI.reshape(4, 8, 4, 8).permute(0, 2, 1, 3)  # row and column of 8 x 8 blocks
        delta = (tiles @ block[:, None] + block[:, None]).permute(0, 2, 1, 3).reshape(32, 32)
        values = torch.linalg.svdvals(delta)
        assert error == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-3)


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("bone", {}, "already"),
        ("lora", {"approximate": 4}, "other conversions are exact"),
        ("dora", {}, "lora or bone or miss"),
        ("lora", {"base": None}, "--base"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, to: str, options: dict[str, Any], said: str
) -> None:
    _, adapter, _ = trained(tmp_path, llama(), r=8, target_modules=["q_proj"])
    with pytest.raises(UsageError, match=said):
        convert(adapter, to, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_lora_is_refused_and_so_is_a_folder_that_someone_made(tmp_path: Path) -> None:
    base, adapter, _ = trained(tmp_path, llama(), r=8, target_modules=["q_proj"])
    convert(adapter, "lora", tmp_path / "lora", base=base)
    with pytest.raises(AdapterError, match="LORA"):
        convert(tmp_path / "lora", "bone", tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        convert(adapter, "lora", tmp_path / "lora", base=base)
    convert(adapter, "lora", tmp_path / "lora", base=base, overwrite=True)
    with pytest.raises(UsageError):
        convert(adapter, "lora", adapter, base=base, overwrite=True)
    with pytest.raises(UsageError, match="converted"):
        bone_fx.verify_export(tmp_path / "lora")


def test_the_command_says_what_is_lost(tmp_path: Path) -> None:
    fields = {"r": 8, "init_weights": "bat", "target_modules": ["q_proj"]}
    base, adapter, _ = trained(tmp_path, llama(), **fields)
    call = ["convert", adapter, "--to", "lora", "--base", base, "-o", tmp_path / "out"]
    done = run(*call)
    assert done.returncode == 2
    assert "--approximate RANK" in done.stderr
    done = run(*call, "--approximate", 4)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of the change is lost: model.layers.") == 2
