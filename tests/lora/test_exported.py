"""Exports of the LoRA family: the logits of PEFT's unmerged model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

import bone_fx
from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.checkpoint_inputs import open_checkpoint
from bone_fx.deploy.earlier_output import read_manifest
from bone_fx.deploy.verification import verify_checkpoint
from bone_fx.deploy.verify_export import exported_of
from bone_fx.errors import VerificationError
from bone_fx.verify.parity import TOLERANCE
from bone_fx.verify.unmerged import lora_layout
from tests.lora.peft_cases import ROWS, make

_SHORT = ("dora", "lora_bias without a bias")
NAMES = [name if name in _SHORT else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]


def _logits(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    feeds: dict[str, Any] = {name: tensor.numpy() for name, tensor in inputs.items()}
    rows = len(inputs["input_ids"])
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            shape = [rows, *(0 if isinstance(size, str) else size for size in value.shape[1:])]
            feeds[value.name] = np.zeros(shape, np.float32)
        elif value.name == "token_type_ids":
            feeds[value.name] = np.zeros_like(feeds["input_ids"])
    return torch.from_numpy(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("name", NAMES)
def test_gives_the_logits_of_the_unmerged_model(name: str, tmp_path: Path) -> None:
    case = make(ROWS[name], tmp_path)
    bone_fx.export(case.base, adapters=[case.adapter], output=tmp_path / "out")
    logits = _logits(tmp_path / "out", case.inputs)
    size = max(1.0, float(case.logits.abs().max()))
    assert float((logits - case.logits).abs().max()) <= 1e-5 * size


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "int4", "int8"])
@pytest.mark.parametrize("name", ["dora", "experts", "tied embeddings", "conv1d", "tokens"])
def test_other_dtypes_are_verified(name: str, dtype: Any, tmp_path: Path) -> None:
    case = make(ROWS[name], tmp_path, dtype=torch.bfloat16)
    out = tmp_path / "out"
    result = bone_fx.export(case.base, adapters=[case.adapter], output=out, dtype=dtype)
    figures = result.manifest["verification"]["figures"]
    pair = "onnx_vs_unmerged" if dtype == "fp16" else "onnx_vs_written"
    assert figures[pair] <= TOLERANCE["fp16" if dtype == "fp16" else "fp32"]


@pytest.mark.slow
def test_kinds_act_one_after_another(tmp_path: Path) -> None:
    """A LoRA, then a DoRA on what it makes: PEFT has no such order, a fold in two steps has."""
    first = make(ROWS["lora"], tmp_path / "first")
    second = make(ROWS["dora"], tmp_path / "second")
    adapters = {"first": first.adapter, "second": second.adapter}
    bone_fx.fold_checkpoint(first.base, adapters=adapters, output=tmp_path / "once")
    bone_fx.fold_checkpoint(first.base, adapters=[first.adapter], output=tmp_path / "half")
    bone_fx.fold_checkpoint(tmp_path / "half", adapters=[second.adapter], output=tmp_path / "twice")
    bone_fx.export(first.base, adapters=adapters, output=tmp_path / "out", verify="fast")
    once, twice = (_logits_of(tmp_path / name, first.inputs) for name in ("once", "twice"))
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(_logits(tmp_path / "out", first.inputs), once, rtol=1e-5, atol=1e-4)


def _logits_of(folder: Path, inputs: dict[str, Tensor]) -> Tensor:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def test_a_wrong_scale_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads the folder for verification is not what exports it: one of them errs here."""
    case = make(ROWS["lora"], tmp_path)
    content = json.loads((case.adapter / "adapter_config.json").read_text())
    assert content["lora_alpha"] == 6
    right = lora_layout._of_pattern
    monkeypatch.setattr(
        lora_layout,
        "_of_pattern",
        lambda config, field, *rest: right(config, field, *rest) * (1 + (field[0] == "a") / 1000),
    )
    with pytest.raises(VerificationError, match="the written weight is not the folded one"):
        bone_fx.export(case.base, adapters=[case.adapter], output=tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("dora", "experts", "tied embeddings", "tokens of a tied pair", "conv1d"),
        *("lora_bias without a bias", "dora of embeddings"),
    ],
)
def test_a_reference_without_room_in_memory_finds_the_same(name: str, tmp_path: Path) -> None:
    case, out = make(ROWS[name], tmp_path), tmp_path / "out"
    bone_fx.export(case.base, adapters=[case.adapter], output=out, verify="off")
    manifest = read_manifest(out)
    assert manifest is not None
    adapters = read_adapters([case.adapter])
    figures = []
    for memory in (1000, 1 << 40):
        inputs = open_checkpoint(case.base, adapters, trust_remote_code=False, revision=None)
        exported = exported_of(out, manifest, inputs, "cpu")
        parity = verify_checkpoint(exported, inputs, "cpu", "fast", memory=memory)
        assert parity.reference == ("streamed" if memory == 1000 else "in memory")
        figures.append(parity.figures)
    assert figures[0] == pytest.approx(figures[1], rel=0.5, abs=1e-5)


@pytest.mark.slow
def test_variants_of_loras_share_what_none_touches(tmp_path: Path) -> None:
    one, other = (make(ROWS[name], tmp_path / name) for name in ("lora", "dora"))
    variants = {"one": one.adapter, "other": other.adapter}
    result = bone_fx.export(one.base, variants=variants, output=tmp_path / "out")
    assert result.verified
