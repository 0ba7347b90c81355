"""A fold of a weight whose rows the export orders: q, k and v packed head by head."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

import bone_fx
from tests.capture.decoder.decoders import DECODERS

ROW = {row.name: row for row in DECODERS}


@pytest.mark.parametrize(
    ("name", "dtype", "ordered"),
    [
        ("gpt_neox", "fp32", True),
        ("falcon_heads", "int4", False),  # attention is written out: no operator asks for an order
        pytest.param("gpt_neox", "int4", True, marks=pytest.mark.slow),
        pytest.param("bloom", "fp32", False, marks=pytest.mark.slow),
    ],
)
def test_the_fold_is_verified_in_the_models_order(
    name: str, dtype: str, ordered: bool, tmp_path: Path
) -> None:
    model = ROW[name].build()
    model.save_pretrained(tmp_path / "base")
    site = next(n for n, _ in model.named_modules() if n.endswith("query_key_value"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    outputs = model.get_parameter(f"{site}.weight").shape[0]
    block = 0.05 * torch.randn(16, outputs, generator=torch.Generator().manual_seed(1))
    save_file({f"base_model.model.{site}.bone_block": block}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "BONE", "r": 16, "target_modules": ["query_key_value"], "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "init_weights": True, "layers_to_transform": [0]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = bone_fx.export(
        tmp_path / "base", output=tmp_path / "out", adapters=[adapter], dtype=dtype
    )
    figures = result.manifest["verification"]["figures"]
    assert figures["onnx_vs_folded" if dtype == "fp32" else "onnx_vs_written"] <= 1e-4
    names = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    assert any(n.startswith(f"{site}.weight.by_part_4_16_16_16") for n in names) == ordered
