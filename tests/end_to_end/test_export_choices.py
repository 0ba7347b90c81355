"""Choices of an export that a whole run has to honour."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import bone_fx
from bone_fx.errors import UsageError
from tests.capture.architectures import BY_NAME
from tests.capture.decoder.decoders import DECODERS

ROW = {row.name: row for row in DECODERS}


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_experts_and_norms_in_half_precision(name: str, tmp_path: Path) -> None:
    # transformers loads the norms of gpt_oss in float32 whatever the dtype of the rest
    ROW[name].build().save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out", dtype="fp16")
    assert result.verified
    operators = [n.op_type for n in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert operators.count("MoE") == 2


def test_logits_of_last_tokens_are_verified(tmp_path: Path) -> None:
    ROW["llama"].build().save_pretrained(tmp_path / "base")
    result = bone_fx.export(
        tmp_path / "base", output=tmp_path / "out", last_token_logits=True, dtype="int8"
    )
    assert result.verified
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    logits = next(value for value in graph.output if value.name == "logits")
    assert logits.type.tensor_type.shape.dim[1].dim_value == 1


def test_an_encoder_has_no_last_token_and_no_calibration(tmp_path: Path) -> None:
    BY_NAME["bert"].build().save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="last_token_logits is for decoders"):
        bone_fx.export(tmp_path / "base", output=tmp_path / "out", last_token_logits=True)
    text = tmp_path / "text"
    text.write_text("one two three")
    with pytest.raises(UsageError, match="calibration is for decoders"):
        bone_fx.export(
            tmp_path / "base", output=tmp_path / "out", dtype="int4", calibration=text, verify="off"
        )
    assert not (tmp_path / "out").exists()


def test_choices_of_a_quantized_export_are_refused_in_others(tmp_path: Path) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path / "base")
    for choice in ({"block_size": 32}, {"symmetric": True}, {"head": "keep"}):
        with pytest.raises(UsageError, match=f"{next(iter(choice))} goes with a quantized export"):
            bone_fx.export(tmp_path / "base", output=tmp_path / "out", **choice)  # type: ignore[arg-type]
    inputs = (torch.zeros(2, 4),)
    with pytest.raises(UsageError, match="goes with a checkpoint"):
        bone_fx.export(
            nn.Linear(4, 4), output=tmp_path / "out", example_inputs=inputs, dtype="int4"
        )


@pytest.mark.parametrize(("dtype", "name"), [(torch.float64, "fp64"), (torch.float16, "fp16")])
def test_a_module_of_your_own_is_published_in_its_dtype(
    dtype: torch.dtype, name: str, tmp_path: Path
) -> None:
    module, inputs = nn.Linear(4, 4).to(dtype), (torch.randn(2, 4, dtype=dtype),)
    result = bone_fx.export(module, output=tmp_path / "out", example_inputs=inputs)
    assert result.manifest["dtype"] == name
