"""A fold of a weight whose rows the export orders: q, k and v of GPT-NeoX."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

import bone_fx
from tests.capture.decoders import DECODERS

ROW = {row.name: row for row in DECODERS}
QKV = "gpt_neox.layers.0.attention.query_key_value.weight.by_part_4_16_16_16"


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_the_fold_is_verified_in_the_models_order(dtype: str, tmp_path: Path) -> None:
    model = ROW["gpt_neox"].build()
    model.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    block = 0.05 * torch.randn(16, 192, generator=torch.Generator().manual_seed(1))
    site = "base_model.model.gpt_neox.layers.0.attention.query_key_value"
    save_file({f"{site}.bone_block": block}, adapter / "adapter_model.safetensors")
    config = {"peft_type": "BONE", "r": 16, "target_modules": ["query_key_value"], "bias": "none"}
    config |= {"task_type": "CAUSAL_LM", "init_weights": True, "layers_to_transform": [0]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = bone_fx.export(
        tmp_path / "base", output=tmp_path / "out", adapters=[adapter], dtype=dtype
    )
    figures = result.manifest["verification"]["figures"]
    key = "onnx_vs_folded" if dtype == "fp32" else "onnx_vs_written"
    assert figures[key] <= 1e-4
    names = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    assert any(name.startswith(QKV) for name in names)
