"""Decoders that keep keys and values in fp8 on CUDA, verified through a twin on the CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import bone_fx
from bone_fx.errors import ExportError, UsageError, VerificationError
from bone_fx.verify.decoder.quantized_cache import FP8, QuantizedCache
from bone_fx.verify.parity import FP8_CACHE, FP8_CACHE_IN_FP16, TOLERANCE
from bone_fx.weights.storage.safetensors_file import file_sha256
from tests.capture.decoder.decoders import DECODERS
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.tiers import slow

ROW = {row.name: row for row in DECODERS}
CUDA: dict[str, Any] = {"provider": "cuda", "kv_cache": "fp8"}


@pytest.mark.parametrize(
    ("name", "dtype", "level"),
    [
        ("mistral", "bf16", "full"),  # with a window, which long texts pass
        ("gpt_oss", "fp16", "fast"),
        *slow(("gpt2", "fp16", "fast")),
        *slow(("nemotron", "bf16", "fast")),  # its rotary embedding stands outside of the attention
    ],
)
def test_tiny_decoders(name: str, dtype: Any, level: Any, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    ROW[name].build().save_pretrained(base)
    manifest = bone_fx.export(base, output=out, dtype=dtype, verify=level, **CUDA).manifest
    verification = manifest["verification"]
    figures, pair = (
        verification["figures"],
        "onnx_vs_written" if dtype == "bf16" else "onnx_vs_unmerged",
    )
    assert figures[pair] <= (TOLERANCE["fp32"] if dtype == "bf16" else FP8_CACHE_IN_FP16)
    assert 0 < figures["fp8_cache"] <= FP8_CACHE
    assert "a twin with a cache of rounded floats was run" in verification["skipped"]["model.onnx"]
    assert (verification["provider"], verification["mode"]) == ("cpu", level)
    assert any("has no CPU kernel: verification runs a twin" in note for note in manifest["notes"])
    assert manifest["kv_cache"]["dtype"] == "fp8"
    assert manifest["placement"]["cuda_graph"] == "yes"
    cached = {n: k for n, k in manifest["graph"]["inputs"].items() if n.startswith("past")}
    cached |= {n: k for n, k in manifest["graph"]["outputs"].items() if n.startswith("present")}
    assert {kind.partition("[")[0] for kind in cached.values()} == {"float8e4m3fn"}
    config = json.loads((out / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True
    if dtype == "fp16":
        # The graph itself is one that ONNX Runtime knows; what it lacks here is the kernel.
        with pytest.raises(Exception, match=r"kernel for com\.microsoft\.GroupQueryAttention"):
            onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])


def test_quantized_weights_and_a_later_verification(tmp_path: Path) -> None:
    base, adapter = tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")
    out = tmp_path / "out"
    choices = {"dtype": "int4", "verify": "fast", **CUDA}
    manifest = bone_fx.export(base, adapters=[adapter], output=out, **choices).manifest
    assert manifest["verification"]["figures"]["onnx_vs_written"] <= FP8_CACHE_IN_FP16
    assert manifest["kv_cache"]["dtype"] == "fp8"
    again = bone_fx.verify_export(out, base=base, adapters=[adapter], verify="fast")
    assert again.verification is not None
    assert again.verification["skipped"].keys() == manifest["verification"]["skipped"].keys()
    alone = bone_fx.verify_export(out)
    assert any("twin" in warning for warning in alone.warnings)
    with pytest.raises(UsageError, match="compared through a twin on the CPU"):
        bone_fx.verify_export(out, base=base, adapters=[adapter], provider="cuda")


def test_what_cannot_keep_one(tmp_path: Path) -> None:
    ROW["falcon_new"].build().save_pretrained(tmp_path / "falcon")
    choices = {"dtype": "fp16", "verify": "off", **CUDA}
    with pytest.raises(ExportError, match="cannot be kept in fp8") as raised:
        bone_fx.export(tmp_path / "falcon", output=tmp_path / "out", **choices)
    assert "export without --kv-cache fp8" in str(raised.value.next_step)
    base = tiny_base(tmp_path / "base")
    with pytest.raises(ExportError, match="no fp32 kernel on CUDA"):
        bone_fx.export(base, output=tmp_path / "out", verify="off", **CUDA)
    with pytest.raises(UsageError, match="on CUDA only"):
        bone_fx.export(base, output=tmp_path / "out", kv_cache="fp8")
    with pytest.raises(UsageError, match="through a twin of the graph"):
        bone_fx.export(base, output=tmp_path / "out", verify_on="cuda", dtype="fp16", **CUDA)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder whose second layer has keys eight times as large, and its export."""
    folder = tmp_path_factory.mktemp("loud")
    model: Any = ROW["llama"].build()
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (4.0, 32.0), strict=True):
            layer.self_attn.k_proj.weight.mul_(factor)
            layer.self_attn.q_proj.weight.div_(factor)
    model.save_pretrained(folder / "base")
    bone_fx.export(folder / "base", output=folder / "out", dtype="fp16", verify="fast", **CUDA)
    return folder


def attentions(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"]


def wrong_scale(graph: onnx.GraphProto) -> None:
    name = attentions(graph)[1].input[13]
    (tensor,) = (each for each in graph.initializer if each.name == name)
    changed = numpy_helper.from_array(numpy_helper.to_array(tensor) * 16, name)
    tensor.CopyFrom(changed)


def exchanged_sides(graph: onnx.GraphProto) -> None:
    inputs = attentions(graph)[0].input
    inputs[12], inputs[13] = inputs[13], inputs[12]


def exchanged_layers(graph: onnx.GraphProto) -> None:
    one, other = (node.input for node in attentions(graph))
    one[12], other[12] = other[12], one[12]


@pytest.mark.parametrize(
    ("defect", "named"),
    [
        (wrong_scale, "layer 1: the scales of its values are not theirs"),
        (exchanged_sides, "layer 0: the scales of its keys are not theirs"),
        (exchanged_layers, "layer 0: the scales of its keys are not theirs"),
    ],
)
def test_scales_of_something_else(
    defect: Callable[[onnx.GraphProto], None], named: str, loud: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(loud / "out", out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    defect(model.graph)
    onnx.save(model, out / "model.onnx")
    manifest = json.loads((out / "bone_export.json").read_text())
    manifest["files"]["model.onnx"]["sha256"] = file_sha256(out / "model.onnx")
    (out / "bone_export.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match=named):
        bone_fx.verify_export(out, base=loud / "base", verify="fast")


def test_codes_are_the_numbers_of_fp8() -> None:
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = bits[bits.isfinite()].unique()  # sorted
    values = torch.cat((torch.linspace(-500, 500, 4001), torch.logspace(-12, 9, 500, base=2.0)))
    inside = values.clamp(-448, 448)
    nearest = FP8.nearest(values)
    far = (inside[:, None] - numbers).abs()
    assert torch.equal((inside - nearest).abs(), far.amin(1))
    above = torch.searchsorted(numbers, inside, right=True).clamp_max(len(numbers) - 1)
    below = numbers[(above - 1).clamp_min(0)]
    # Between two numbers a step is their distance; at one, that of the larger side.
    between = (inside != below) & (inside.abs() < 448)
    assert torch.equal(FP8.step(inside)[between], (numbers[above] - below)[between])


def test_a_code_that_is_not_the_references() -> None:
    scale = torch.full((2, 1, 16), 0.01)
    plain = QuantizedCache(FP8, {0: (scale, scale)}, frozenset(), 1e-4, {})
    keys = nn.functional.hardtanh(torch.randn(1, 2, 5, 16, generator=torch.manual_seed(0)), -4, 4)
    codes = FP8.nearest(keys / 0.01)
    past = {"present.0.key": codes.numpy().copy(), "present.0.value": codes.numpy()}
    same = plain.with_codes(past, 0, 5).rounded(0, "key", keys[0], 0)
    assert torch.equal(same, codes[0] * scale)
    past["present.0.key"][0, 1, 3, 7] *= 1.25  # a step or two of it
    with pytest.raises(VerificationError, match=r"another key of token 3 \(head 1, channel 7\)"):
        plain.with_codes(past, 0, 5).rounded(0, "key", keys[0], 0)
