"""Constants of a written graph against the model's own parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Glm4MoeConfig, Glm4MoeForCausalLM

import bone_fx
from bone_fx.errors import VerificationError
from bone_fx.verify.compare_quantized import Written
from bone_fx.verify.constants import verify_constants
from bone_fx.verify.parity import TOLERANCE
from tests.capture.decoder.decoders import DECODERS
from tests.end_to_end.tiny import tiny_base


def test_a_row_of_nan_is_named_as_nan(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="NaN or Inf in the output"):
        bone_fx.export(base, output=tmp_path / "out", verify="fast")


def test_a_router_in_float32_and_groups_of_experts_are_verified_in_fp16(tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "hidden_size": 48, "intermediate_size": 80, "moe_intermediate_size": 32, "vocab_size": 99,
        "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 16,
        "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_group": 2, "topk_group": 1, "max_position_embeddings": 64,
    }  # fmt: skip
    config = Glm4MoeConfig(**fields)
    torch.manual_seed(0)
    model = Glm4MoeForCausalLM(config)
    torch.nn.init.normal_(model.model.layers[1].mlp.gate.weight)
    model.save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out", dtype="fp16", verify="fast")
    figures = result.manifest["verification"]["figures"]
    assert figures["onnx_vs_unmerged"] <= TOLERANCE["fp16"]


@pytest.mark.parametrize("dtype", ["fp32", "int4"])
def test_a_square_weight_is_not_taken_for_its_transposed(dtype: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model: Any = next(row for row in DECODERS if row.name == "gpt2").build()
    model.save_pretrained(base)
    bone_fx.export(base, output=out, dtype=dtype, verify="off")

    def compare(reference: Any) -> None:
        verify_constants(out / "model.onnx", reference, [])
        if dtype == "int4":
            assert Written(out / "model.onnx", accuracy_level=4).load_into(reference) > 0

    compare(model)
    reference: Any = AutoModelForCausalLM.from_pretrained(base)
    layer = reference.transformer.h[1].attn.c_proj
    layer.weight.data = layer.weight.data.t().contiguous()
    with pytest.raises(VerificationError, match=r"h\.1\.attn\.c_proj"):
        compare(reference)
