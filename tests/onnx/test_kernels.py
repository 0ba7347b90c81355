"""Operators by provider: what exports for CUDA are made of has kernels there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxruntime.capi import _pybind_state as ort
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

import bone_fx
from bone_fx.onnx.kernels import CUDA_KERNELS, LATEST_OPSET, without_cuda_kernel
from bone_fx.onnx.torch_exporter import OPSET

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "gemma": GemmaConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4),
}


def base(folder: Path, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def graph_of(*nodes: ir.Node) -> ir.Model:
    graph = ir.Graph(list(nodes[0].inputs), nodes[-1].outputs, nodes=nodes, opset_imports={"": 18})  # type: ignore[arg-type]
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_node_of_a_cuda_export_has_a_kernel(name: str, dtype: Any, tmp_path: Path) -> None:
    result = bone_fx.export(
        base(tmp_path / "base", CONFIGS[name]),
        output=tmp_path / "out",
        dtype=dtype,
        provider="cuda",
        verify_on="cpu",
    )
    assert result.verified
    assert result.manifest["placement"] == {}
    fused = "com.microsoft::GroupQueryAttention" in result.manifest["operators"]
    assert fused == (dtype == "fp16")


def test_table_is_for_the_opset_that_is_written() -> None:
    assert OPSET <= LATEST_OPSET


def test_table_names_operators_that_exist() -> None:
    known = {(s.domain, s.name) for s in ort.get_all_operator_schema()}
    assert not {key for key in CUDA_KERNELS if key not in known}


def test_operators_have_cpu_kernels_too() -> None:
    """What a CUDA graph is made of can be verified on the CPU."""
    kernels = {
        (k.domain, k.op_name) for k in ort.get_registered_ep_kernel_defs("CPUExecutionProvider")
    }
    folded = {("", "Constant")}  # made an initializer when the model is loaded
    assert not {key for key in CUDA_KERNELS if key not in kernels | folded}


def test_missing_kernels_are_counted_and_shapes_are_not() -> None:
    x = ir.Value(name="x")
    shape = ir.node("Shape", [x])
    on_shape = ir.node("BitwiseNot", [shape.outputs[0]])
    first = ir.node("Mish", [x])
    second = ir.node("Mish", [first.outputs[0]])
    attention = ir.node("GroupQueryAttention", [second.outputs[0]], domain="com.microsoft")
    model = graph_of(shape, on_shape, first, second, attention)
    assert without_cuda_kernel(model, "fp16") == {"Mish": 2}
    assert without_cuda_kernel(model, "fp32") == {
        "Mish": 2,
        "com.microsoft::GroupQueryAttention": 1,
    }
