"""Encoders: MiniLM with an adapter on real sentences, and heads from `modules_to_save`."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification

import bone_fx
from tests.end_to_end.zen import zen

ORACLE = Path(__file__).parents[1] / "oracle" / "bert_cls_bone"


def sentences() -> list[str]:
    """Fifty sentences of mixed length."""
    lines = [line for line in zen().splitlines() if line]
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(lines)]
    long = [" ".join(lines[i : i + 7]) for i in range(len(lines))]
    return [*lines, *pairs, *long][:50]


def embeddings(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there, of length one."""
    summed = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(summed, dim=-1)


def run(folder: Path, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    arrays = {value.name: feeds[value.name].numpy() for value in session.get_inputs()}
    return dict(zip(names, map(torch.from_numpy, session.run(None, arrays)), strict=True))


@pytest.mark.parametrize("method", [True, pytest.param("bat", marks=pytest.mark.slow)])
def test_minilm_with_an_adapter(method: Any, minilm: Path, tmp_path: Path) -> None:
    texts = sentences()
    assert len(set(texts)) == 50
    batch = AutoTokenizer.from_pretrained(minilm)(texts, padding=True, return_tensors="pt")
    feeds = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    config = bone_fx.BoneConfig(
        r=32,
        target_modules=["query", "value", "dense"],
        init_weights=method,
        exclude_modules=["pooler.dense"],
    )
    adapted = bone_fx.adapt(model, config, feeds)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "bone_block" in name:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(tmp_path / "adapter")
    result = bone_fx.export(minilm, adapters=[tmp_path / "adapter"], output=tmp_path / "out")
    assert result.verified
    assert result.manifest["verification"]["figures"]["adapter_effect"] > 0.01
    with torch.no_grad():
        expected = embeddings(adapted(**feeds).last_hidden_state, feeds["attention_mask"])
        base = embeddings(model(**feeds).last_hidden_state, feeds["attention_mask"])
    found = embeddings(run(tmp_path / "out", feeds)["last_hidden_state"], feeds["attention_mask"])
    assert float((found - expected).abs().max()) <= 1e-4
    assert float((found - base).abs().max()) > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 30522


@pytest.mark.parametrize("base_has_head", [True, False])
def test_a_trained_head_is_exported(base_has_head: bool, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(ORACLE / "base", base)
    shutil.copytree(ORACLE / "adapter", adapter)
    config = json.loads((base / "config.json").read_text())
    assert json.loads((adapter / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    if not base_has_head:
        weights = load_file(base / "model.safetensors")
        kept = {k.removeprefix("bert."): v for k, v in weights.items() if k.startswith("bert.")}
        save_file(kept, base / "model.safetensors", {"format": "pt"})
        config["architectures"] = ["BertModel"]
        config.pop("id2label", None)
        config.pop("label2id", None)
        (base / "config.json").write_text(json.dumps(config))
    expected = load_file(ORACLE / "expected.safetensors")
    result = bone_fx.export(base, adapters=[adapter], output=tmp_path / "out")
    assert result.manifest["architecture"] == "BertForSequenceClassification"
    feeds = {name: expected[name] for name in ("input_ids", "attention_mask")}
    logits = run(tmp_path / "out", feeds)["logits"]
    np.testing.assert_allclose(logits.numpy(), expected["logits"].numpy(), atol=1e-5)
    plain = BertForSequenceClassification.from_pretrained(ORACLE / "base").eval()
    with torch.no_grad():
        assert float((plain(**feeds).logits - logits).abs().max()) > 1e-3
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert len(written["id2label"]) == expected["logits"].shape[-1]
