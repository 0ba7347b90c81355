"""Decoders that keep keys and values in int8, exported, verified and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import bone_fx
from bone_fx.errors import ExportError, UsageError, VerificationError
from bone_fx.verify.decoder.quantized_cache import INT8, QuantizedCache
from bone_fx.verify.decoder.running import empty_past, outputs_of, past_of
from bone_fx.verify.parity import INT8_CACHE, TOLERANCE
from tests.capture.decoder.decoders import DECODERS
from tests.end_to_end.test_calibrated import number_tokenizer
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.tiers import slow

ROW = {row.name: row for row in DECODERS}
RANDOM = "the cache was measured on random tokens"


def exported(base: Path, output: Path, **choices: Any) -> dict[str, Any]:
    return bone_fx.export(base, output=output, **{"kv_cache": "int8", **choices}).manifest


def ran(folder: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits of a prompt and a step, and the cache after them."""
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    ids = np.array([[5, 3, 8, 2, 9, 4, 1, 7]])
    first = outputs_of(session, ids, np.ones_like(ids), empty_past(session, 1))
    mask = np.ones((1, 9), np.int64)
    second = outputs_of(session, ids[:, :1], mask, past_of(first))
    return np.concatenate([first["logits"], second["logits"]], 1), past_of(second)


@pytest.mark.parametrize("name", ["mistral", *slow("llama", "qwen2")])
def test_tiny_decoders(name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    ROW[name].build().save_pretrained(base)
    level = "full" if name == "mistral" else "fast"  # with a window, which long texts pass
    manifest = exported(base, tmp_path / "int8", verify=level)
    exported(base, tmp_path / "float", kv_cache="float", verify="off")
    figures = manifest["verification"]["figures"]
    assert figures["onnx_vs_unmerged"] <= TOLERANCE["fp32"]
    assert 0 < figures["int8_cache"] <= INT8_CACHE
    assert not any("scale" in case for case in manifest["verification"]["skipped"])
    cached = {n: k for n, k in manifest["graph"]["inputs"].items() if n.startswith("past")}
    cached |= {n: k for n, k in manifest["graph"]["outputs"].items() if n.startswith("present")}
    assert len(cached) == 8
    assert {kind.partition("[")[0] for kind in cached.values()} == {"int8"}
    assert manifest["kv_cache"]["text"] == "random tokens"  # there is no tokenizer
    assert any(note.startswith(RANDOM) for note in manifest["notes"])
    (logits, cache), (others, floats) = ran(tmp_path / "int8"), ran(tmp_path / "float")
    assert not np.array_equal(logits, others)
    assert np.abs(logits - others).max() <= INT8_CACHE * np.abs(others).max()
    sizes = [sum(value.nbytes for value in each.values()) for each in (cache, floats)]
    assert sizes[0] <= 0.27 * sizes[1]
    kept = QuantizedCache.of(tmp_path / "int8" / "model.onnx")
    assert kept is not None
    for past, codes in cache.items():
        _, layer, side = past.split(".")
        near = kept.floats(int(layer), side, torch.from_numpy(codes[0]))
        largest = float(np.abs(floats[past]).max())
        assert float((near - torch.from_numpy(floats[past][0])).abs().max()) <= 0.1 * largest


def test_a_text_an_adapter_and_quantized_weights(tmp_path: Path) -> None:
    base, adapter = tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")
    number_tokenizer(base)
    text, out = tmp_path / "numbers.txt", tmp_path / "out"
    text.write_text(" ".join(str(n * n % 127) for n in range(9, 400)))
    manifest = exported(base, out, adapters=[adapter], dtype="int4", calibration=text)
    used = manifest["kv_cache"]
    assert (used["text"], used["tokens"]) == ("numbers.txt", 4 * 64)
    assert used["sha256"] == manifest["quantization"]["calibration"]["sha256"]
    figures = manifest["verification"]["figures"]
    assert figures["onnx_vs_written"] <= TOLERANCE["fp32"]
    assert 0 < figures["int8_cache"] <= INT8_CACHE
    again = bone_fx.verify_export(out, base=base, adapters=[adapter], verify="fast")
    assert again.verification is not None
    assert again.verification["figures"]["int8_cache"] <= INT8_CACHE
    nearest = exported(base, tmp_path / "nearest", dtype="int4", calibration="none", verify="off")
    assert nearest["quantization"]["calibration"] is None
    assert nearest["kv_cache"]["text"] == "built-in"


@pytest.mark.parametrize("dtype", ["bf16", *slow("fp16")])
def test_half_floats_for_cuda(dtype: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    ROW["mixtral" if dtype == "bf16" else "gpt_oss"].build().save_pretrained(base)
    choices: dict[str, Any] = {"dtype": dtype, "provider": "cuda", "verify_on": "cpu"}
    manifest = exported(base, tmp_path / "out", verify="fast", **choices)
    assert manifest["placement"]["cuda_graph"] == "yes"
    figures = manifest["verification"]["figures"]
    held = figures["onnx_vs_written" if dtype == "bf16" else "onnx_vs_unmerged"]
    assert held <= TOLERANCE["fp32" if dtype == "bf16" else "fp16"]
    assert 0 < figures["int8_cache"] <= INT8_CACHE
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is True


def test_models_without_such_a_cache(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    with pytest.raises(ExportError, match="no fp32 kernel on CUDA"):
        exported(base, tmp_path / "out", provider="cuda", verify="off")
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    encoder = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2))
    encoder.save_pretrained(tmp_path / "encoder")
    with pytest.raises(UsageError, match="kv_cache is for decoders"):
        exported(tmp_path / "encoder", tmp_path / "out", verify="off")
    assert not (tmp_path / "out").exists()


def test_codes_that_are_not_the_references() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 3, 5, 16, generator=generator) for _ in range(2))
    scale = torch.rand(3, 1, 16, generator=generator) / 40 + 0.04
    plain = QuantizedCache(INT8, {0: (scale, scale)}, frozenset(), 1e-4, {})
    codes = [(t[0] / scale).round().to(torch.int8) for t in (keys, values)]
    # A code on the other side of a tie is the graph's to choose; another is not.
    tie = keys.clone()
    tie[0, 1, 2, 3] = 7.5 * scale[1, 0, 3]
    codes[0][1, 2, 3] = 7
    past = {"present.0.key": codes[0][None].numpy(), "present.0.value": codes[1][None].numpy()}
    kept = plain.with_codes(past, 0, 5)
    rounded = kept.rounded(0, "key", tie[0], 0)
    assert float(rounded[1, 2, 3]) == float(7 * scale[1, 0, 3])
    assert torch.equal(
        kept.rounded(0, "value", values[0, :, 2:], 2),
        plain.rounded(0, "value", values[0, :, 2:], 2),
    )
    past["present.0.key"][0, 2, 4, 9] += 2
    with pytest.raises(
        VerificationError, match=r"layer 0: .* key of token 4 \(head 2, channel 9\)"
    ):
        plain.with_codes(past, 0, 5).rounded(0, "key", tie[0], 0)
