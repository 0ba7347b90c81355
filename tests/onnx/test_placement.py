"""Graphs for CUDA are made of operators that have kernels there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
)

import bone_fx
from bone_fx.capture.decoder.capture_decoder import capture_decoder
from bone_fx.capture.decoder.own_attention import OWN_ATTENTION
from bone_fx.deploy.builds.checkpoint import ONE_BEAM
from bone_fx.deploy.builds.checkpoint_graph import NO_FP32_KERNEL
from bone_fx.errors import ExportError
from bone_fx.onnx.placement import ON_SIZES, place
from tests.capture.decoder.decoders import DECODERS
from tests.capture.decoder.decoding import differences, onnx_of, session_of, skeleton_of
from tests.tiers import slow

GQA = "com.microsoft::GroupQueryAttention"
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ROW = {row.name: row for row in DECODERS}
UNUSUAL = (
    *("gpt_oss", "nemotron", "stablelm_qk_norm"),
    *slow("llama_head_20", "phi_narrow", "cohere_qk_norm", "opt", "olmo", "phi3_longrope_short"),
)
"""Rows that between them hold the operators of all; the tool count_nodes looks at every row."""


def built(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "bert":
        return BertForSequenceClassification(BertConfig(**SMALL))
    config = {
        "llama": LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
        "tied": LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
        "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=16),
        "gpt2": GPT2Config(vocab_size=64, n_positions=64, n_embd=64, n_layer=2, n_head=4),
    }[name]
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("tied", "int4"), ("gemma", "fp32"), ("bert", "bf16")),
        *slow(("llama", "fp16"), ("gpt2", "bf16"), ("bert", "fp16")),
    ],
)
def test_an_export_says_where_each_node_runs(name: str, dtype: Any, tmp_path: Path) -> None:
    built(name).save_pretrained(tmp_path / "base")
    result = bone_fx.export(
        tmp_path / "base",
        output=tmp_path / "out",
        dtype=dtype,
        provider="cuda",
        verify_on="cpu",
    )
    assert result.verified
    placement = json.loads((tmp_path / "out/bone_export.json").read_text())["placement"]
    nodes = {node.name: node.op_type for node in ir.load(tmp_path / "out/model.onnx").graph}
    on_cpu = placement["on_cpu"]
    assert placement["on_cuda"] + len(on_cpu) == len(nodes)
    assert on_cpu == {node: nodes[node] for node in on_cpu}
    assert placement["reason_on_cpu"] == ON_SIZES
    if name != "bert":
        assert (GQA in result.manifest["operators"]) == (dtype != "fp32")
        assert (NO_FP32_KERNEL in result.manifest["notes"]) == (dtype == "fp32")


def test_a_cuda_graph_is_asked_for_in_genai_config(tmp_path: Path) -> None:
    ROW["phi3_longrope_short"].build().save_pretrained(tmp_path / "base")
    choices: dict[str, Any] = {"provider": "cuda", "verify_on": "cpu", "cuda_graph": True}
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out", dtype="fp16", **choices)
    assert result.manifest["placement"]["cuda_graph"] == "yes"
    assert result.manifest["placement"]["memcpy"] == []
    assert ONE_BEAM in result.warnings
    content = json.loads((tmp_path / "out/genai_config.json").read_text())
    session = content["model"]["decoder"]["session_options"]
    assert session["provider_options"] == [{"cuda": {"enable_cuda_graph": "1"}}]
    grows = "the cache is concatenated, and another shape in every step"
    with pytest.raises(ExportError, match=grows):
        bone_fx.export(tmp_path / "base", output=tmp_path / "fp32", dtype="fp32", **choices)


def placement_of(name: str, dtype: torch.dtype) -> Any:
    model = ROW[name].build()
    capture = capture_decoder(
        skeleton_of(model, dtype),
        unfused=NO_FP32_KERNEL if dtype == torch.float32 else None,
    )
    return place(onnx_of(capture, model))


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_decoders_in_bf16(name: str) -> None:
    """No dtype has fewer kernels; what is computed in another one is looked up by that."""
    assert not placement_of(name, torch.bfloat16).missing


@pytest.mark.parametrize("name", ["gpt_oss", *slow("phi3_longrope_short", "gpt_neox")])
def test_unusual_decoders_in_fp32(name: str) -> None:
    assert not placement_of(name, torch.float32).missing


def test_alibi_is_written_out_for_cuda() -> None:
    model = ROW["bloom"].build()
    capture = capture_decoder(skeleton_of(model, torch.float16))
    translated = onnx_of(capture, model.half().float())
    assert not place(translated).missing
    assert OWN_ATTENTION in capture.notes
    assert not capture.share_buffer
    assert max(differences(model, capture, session_of(translated)).values()) < 3e-2


def test_a_node_without_a_kernel_is_an_error(tmp_path: Path) -> None:
    class Bits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x & 3

    with pytest.raises(ExportError, match=r"BitwiseAnd \(\w+\): no CUDA kernel is known") as error:
        bone_fx.export(
            Bits(),
            output=tmp_path / "out",
            provider="cuda",
            verify_on="cpu",
            example_inputs=(torch.arange(6).reshape(2, 3),),
        )
    assert error.value.next_step
    assert not (tmp_path / "out").exists()


def graph_of(inputs: list[ir.Value], *nodes: ir.Node) -> ir.Model:
    """A graph that ends in the last node; every other value without a producer is a constant."""
    read = [value for node in nodes for value in node.inputs if value is not None]
    constants = {v.name: v for v in read if v.producer() is None and v not in inputs}
    graph = ir.Graph(
        inputs,
        nodes[-1].outputs,
        nodes=nodes,
        initializers=list(constants.values()),
        opset_imports={"": 18},
    )
    return ir.Model(graph, ir_version=10)


def constant(name: str, *values: int) -> ir.Value:
    tensor = ir.tensor(list(values), ir.DataType.INT64, name=name)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.INT64))


def value(name: str, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype))


def test_each_node_is_looked_up_by_its_own_dtype() -> None:
    x = value("x", ir.DataType.BFLOAT16)
    wide = ir.node("Cast", [x], {"to": ir.DataType.FLOAT}, name="wide")
    good = ir.node("ReduceMean", wide.outputs, name="good")
    bad = ir.node("Log", [x], name="bad")
    shape = ir.node("Shape", [x], name="shape")
    on_shape = ir.node("BitwiseNot", shape.outputs, name="on_shape")
    found = place(graph_of([x], wide, good, bad, shape, on_shape))
    assert found.missing == {"bad": ("Log", "no CUDA kernel for bfloat16")}
    assert found.on_cpu == {"on_shape": "BitwiseNot"}, "Shape itself reads nothing of the device"
    assert found.on_cuda == 3


def test_a_size_that_meets_a_value_of_the_device_is_copied() -> None:
    ids, mask = value("ids"), value("mask")
    size = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="size")
    valid = ir.node("ReduceSum", [mask, constant("axis", 1)], name="valid")
    before = ir.node("Sub", [valid.outputs[0], size.outputs[0]], name="before")
    found = place(graph_of([ids, mask], size, valid, before))
    copied = f"{size.outputs[0].name} to the device, for Sub (before)"
    assert found.copies == [copied]
    assert found.report()["cuda_graph"] == (f"no: a value is copied between CPU and GPU: {copied}")


def test_what_a_kernel_reads_on_the_host_is_not_copied() -> None:
    ids = value("ids")
    size = ir.node("Shape", [ids], {"start": 1, "end": 2}, name="size")
    count = ir.node("Squeeze", size.outputs, name="count")
    places = ir.node("Range", [constant("0"), count.outputs[0], constant("1")], name="places")
    row = ir.node("Gather", [ids, places.outputs[0]], name="row")
    found = place(graph_of([ids], size, count, places, row))
    assert (found.on_cpu, found.copies) == ({"count": "Squeeze"}, [])
    assert found.report()["cuda_graph"] == "yes"


def test_a_cut_at_a_place_that_the_device_computed_is_copied_to_the_host() -> None:
    x = value("x")
    start = ir.node("ReduceMax", [x, constant("axes", 0)], name="start")
    cut = ir.node("Slice", [x, start.outputs[0], constant("end", 9)], name="cut")
    found = place(graph_of([x], start, cut))
    assert found.copies == [f"{start.outputs[0].name} to the host, for Slice (cut)"]


def test_an_input_of_the_graph_beside_a_size_keeps_a_node_on_the_cpu() -> None:
    x, y = value("x"), value("y")
    size = ir.node("Size", [x], name="size")
    total = ir.node("Add", [y, size.outputs[0]], name="sum")
    large = ir.node("Add", [total.outputs[0], constant("large", *range(101))], name="large")
    found = place(graph_of([x, y], size, total, large))
    assert found.on_cpu == {"sum": "Add"}, "more than 100 values of a constant count as large"
    assert [copy.split()[0] for copy in found.copies] == ["y", total.outputs[0].name]


def test_what_waits_for_the_device_is_not_captured() -> None:
    x = value("x")
    found = place(graph_of([x], ir.node("NonZero", [x], name="where")))
    assert found.why_not_captured() == "NonZero (where) waits for values of the device"


@pytest.mark.parametrize(
    ("name", "last"),
    [
        *(("phi3_longrope_short", False), ("qwen3_moe", False), ("gpt2", True)),
        *slow(("llama", False), ("gpt2", False), ("opt", False), ("llama", True)),
    ],
)
def test_a_decoder_is_captured_as_a_cuda_graph(name: str, last: bool) -> None:
    model = ROW[name].build()
    capture = capture_decoder(skeleton_of(model, torch.float16), last_token_logits=last)
    assert place(onnx_of(capture, model)).report()["cuda_graph"] == "yes"
