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
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
)

import bone_fx
from tests.end_to_end.zen import zen
from tests.tiers import slow

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


@pytest.mark.parametrize(("method", "level"), [(True, "fast"), *slow(("bat", "full"))])
def test_minilm_with_an_adapter(method: Any, level: Any, minilm: Path, tmp_path: Path) -> None:
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
    adapters = [tmp_path / "adapter"]
    result = bone_fx.export(minilm, adapters=adapters, output=tmp_path / "out", verify=level)
    assert result.verified
    assert result.manifest["verification"]["figures"]["adapter_effect"] > 0.01
    with torch.no_grad():
        expected = embeddings(adapted(**feeds).last_hidden_state, feeds["attention_mask"])
        base = embeddings(model(**feeds).last_hidden_state, feeds["attention_mask"])
    found = embeddings(run(tmp_path / "out", feeds)["last_hidden_state"], feeds["attention_mask"])
    assert float((found - expected).abs().max()) <= 1e-4
    assert float((found - base).abs().max()) > 1e-2
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 30522


@pytest.mark.parametrize("base_has_head", [False, *slow(True)])
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


@pytest.mark.slow
def test_windows_of_a_bidirectional_model(tmp_path: Path) -> None:
    """Texts longer than a window see no more than it, forward and backward."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, use_bidirectional_attention=True,
        sliding_window=9, layer_types=["sliding_attention", "full_attention"],
        initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    model = Gemma3TextModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out")
    lengths = {case.partition("]")[0] for case in result.manifest["verification"]["ran"]}
    assert "input_ids [2, 64" in lengths
    assert len([case for case in lengths if case.startswith("input_ids [2, ")]) > 1
    ids = torch.randint(3, 99, (2, 41), generator=torch.Generator().manual_seed(1))
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        expected = model(**feeds).last_hidden_state
        config.sliding_window = 4000
        everything = Gemma3TextModel(config).eval()
        everything.load_state_dict(model.state_dict())
        without = everything(**feeds).last_hidden_state
    found = run(tmp_path / "out", feeds)["last_hidden_state"]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (without - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize("field", ["output_hidden_states", *slow("output_attentions")])
def test_outputs_that_a_configuration_asks_for(field: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=99, intermediate_size=48, **sizes)
    BertModel(config).save_pretrained(tmp_path / "base")
    content = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**content, field: True}))
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out")
    assert result.verified
    ones = torch.ones(1, 5, dtype=torch.long)
    outputs = run(tmp_path / "out", {"input_ids": ones, "attention_mask": ones})
    assert sum(name.startswith("hidden_states") for name in outputs) == (
        3 if "hidden" in field else 0
    )
