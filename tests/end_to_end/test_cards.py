"""What a model card says about running the folder runs, for every kind of output."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import bone_fx
from tests.deploy.test_companions import tokenizer
from tests.end_to_end.tiny import tiny_adapter, tiny_base


class TwoInputs(nn.Module):
    """A module with a float and a flag."""

    def forward(self, x: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
        return torch.where(upper, x.relu(), x)


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """Run the Python of a card as it stands there; what it prints."""
    (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(folder)
    exec(compile(code, "README.md", "exec"), {})
    return str(capsys.readouterr().out)


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    tiny_base(tmp_path / "base")
    tiny_adapter(tmp_path / "adapter")
    return tmp_path


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_decoder(
    with_tokenizer: bool, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if with_tokenizer:
        tokenizer(inputs / "base")
    bone_fx.export(
        inputs / "base", adapters=[inputs / "adapter"], output=inputs / "out", verify="off"
    )
    card = (inputs / "out/README.md").read_text()
    assert "Nothing: it was published with verification" in card
    kind = "`float32[batch_size, 3, past_sequence_length, 16]`"
    assert f"| `past_key_values.N.key` | {kind} | input: keys" in card
    assert "N is 0, 1 |" in card
    assert run_card(inputs / "out", monkeypatch, capsys).strip()


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_fold(
    with_tokenizer: bool, inputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    if with_tokenizer:
        tokenizer(inputs / "base")
    bone_fx.fold_checkpoint(inputs / "base", adapters=[inputs / "adapter"], output=inputs / "out")
    printed = run_card(inputs / "out", monkeypatch, capsys)
    assert bool(printed.strip()) == with_tokenizer


@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_encoder(
    with_tokenizer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = BertConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=3,
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    if with_tokenizer:
        made: PreTrainedTokenizerFast = tokenizer(tmp_path / "base")
        made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        made.save_pretrained(tmp_path / "base")
    bone_fx.export(tmp_path / "base", output=tmp_path / "out", verify="off")
    rows = 2 if with_tokenizer else 1
    assert f"logits ({rows}, 2)" in run_card(tmp_path / "out", monkeypatch, capsys)


def test_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    example = (torch.randn(3, 48), torch.ones(3, 48, dtype=torch.bool))
    bone_fx.export(TwoInputs(), output=tmp_path / "out", example_inputs=example)
    assert "(1, 48)" in run_card(tmp_path / "out", monkeypatch, capsys)
