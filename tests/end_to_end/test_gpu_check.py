"""Exports for CUDA run there as their manifests say; where there is no GPU, the same on the CPU."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import bone_fx
from tests.architecture.sources import ROOT
from tests.capture.decoder.decoders import DECODERS
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.tiers import slow

sys.path.insert(0, str(ROOT / "tools"))
gpu_check: Any = import_module("gpu_check")

pytestmark = pytest.mark.gpu(or_cpu=True)

PROVIDER: Any = "cuda" if torch.cuda.is_available() else "cpu"
GRAPH = "CUDA graph" if PROVIDER == "cuda" else "static mask"
ROW = {row.name: row for row in DECODERS}
NAMES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("phi3_longrope_short", "gpt2", "opt", "olmo2", "mixtral", "gpt_oss"),
)
QUANTIZED = ("opt", "gemma2", "phi3_longrope_short", "mixtral", "gpt_oss")
DTYPES = ["fp16", "int4", "int8", *(["bf16"] if PROVIDER == "cuda" else [])]
"""ONNX Runtime does not run bf16 on the CPU."""
CACHES = ["int8", *(["fp8"] if PROVIDER == "cuda" else [])]
"""Its CPU provider has no kernel for a cache in fp8."""
QUICK = ["--prompts", "4,12", "--tokens", "4", "--repeats", "1", "--provider", PROVIDER]


def exported(name: str, out: Path, dtype: Any, **choices: Any) -> Path:
    ROW[name].build().save_pretrained(out / "base")
    choices = {"provider": "cuda", "verify": "fast", "verify_on": PROVIDER, **choices}
    bone_fx.export(out / "base", output=out / dtype, dtype=dtype, **choices)
    return out / str(dtype)


def rows_of(folder: Path, *more: str) -> list[dict[str, Any]]:
    """The rows of a check; it found nothing wrong."""
    file = folder.parent / "rows.jsonl"
    assert gpu_check.main([str(folder), *QUICK, "--json", str(file), *more]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(("opt", "fp16"), ("llama", "int4")),
        *slow(*((name, "fp16") for name in NAMES if name != "opt")),
        *slow(*((name, dtype) for name in QUANTIZED for dtype in DTYPES[1:])),
    ],
)
def test_a_decoder_runs_as_it_says(name: str, dtype: str, tmp_path: Path) -> None:
    rows = rows_of(exported(name, tmp_path, dtype))
    settings = [row["setting"] for row in rows]
    assert settings[:2] == ["as written", GRAPH]
    assert len(settings) == 2 + dtype.startswith("int")
    for row in rows:
        assert {"prefill_4_ms", "decode_12_ms", "memory_gb", "onnxruntime"} <= row.keys()
        if "parity" in row:  # a near tie may end the texts' agreement, and only that
            assert int(row["tokens_equal"].partition("/")[0]) >= 1


def test_last_logits_with_random_weights_against_another_folder(tmp_path: Path) -> None:
    last = exported("llama", tmp_path / "last", "fp16", last_token_logits=True)
    every = exported("llama", tmp_path / "every", "fp16")
    before = (last / "model.onnx.data").read_bytes()
    with pytest.raises(SystemExit, match="has weights"):
        gpu_check.main([str(last), *QUICK, "--random"])
    assert before == (last / "model.onnx.data").read_bytes()
    for folder in (last, every):
        (folder / "model.onnx.data").unlink()
    rows = rows_of(last, "--against", str(every), "--random", "--batch", "2")
    assert [row["folder"] for row in rows] == [last.name, every.name] * 2
    assert len(before) == len((last / "model.onnx.data").read_bytes())
    assert before != (last / "model.onnx.data").read_bytes()
    assert "to" in rows[1]["decode_4_of_first"]


@pytest.mark.parametrize("dtype", ["int4", *slow("fp16")])
def test_a_graph_of_a_shape_without_weights(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape_graphs: Any = import_module("shape_graphs")
    folder = tmp_path / "shape"
    command = ["shape_graphs.py", "tiny", "--dtype", dtype, "-o", str(folder)]
    monkeypatch.setattr(sys, "argv", command)
    shape_graphs.main()
    said = json.loads((folder / "bone_export.json").read_text())
    assert not (folder / "model.onnx.data").exists()
    assert len(rows_of(folder, "--random")) == 2 + (dtype == "int4")
    assert (folder / "model.onnx.data").stat().st_size == said["data_bytes"]


@pytest.mark.parametrize("kv_cache", CACHES)
def test_a_cache_in_8_bits(kv_cache: str, tmp_path: Path) -> None:
    folder = exported("llama", tmp_path, "fp16", kv_cache=kv_cache, verify_on="cpu")
    rows = rows_of(folder, "--batch", "2")
    assert [row["setting"] for row in rows] == ["as written", GRAPH]
    assert all(row["tokens_equal"].startswith("1") for row in rows) or PROVIDER == "cuda"


def test_each_variant_has_its_rows(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    variants = {name: tiny_adapter(tmp_path / name) for name in ("poet", "facts")}
    choices: dict[str, Any] = {"dtype": "fp16", "provider": "cuda", "verify": "off"}
    out = tmp_path / "both"
    bone_fx.export(base, output=out, variants=variants, **choices)
    shutil.copytree(out, tmp_path / "copy")
    rows = rows_of(out, "--against", str(tmp_path / "copy"))
    assert [(row["folder"], row["setting"]) for row in rows] == [
        (f"{folder}/{name}", setting)
        for name in ("facts", "poet")
        for setting in ("as written", GRAPH)
        for folder in ("both", "copy")
    ]


def test_a_cache_that_grows_has_no_graph(tmp_path: Path) -> None:
    folder = exported("llama", tmp_path, "fp32")
    assert [row["setting"] for row in rows_of(folder)] == ["as written"]


def test_a_folder_that_does_not_hold_what_it_says(tmp_path: Path) -> None:
    folder = exported("llama", tmp_path, "fp16")
    (folder / "model.onnx.data").write_bytes(
        bytes((folder / "model.onnx.data").stat().st_size // 2)
    )
    assert gpu_check.main([str(folder), *QUICK]) == 1
