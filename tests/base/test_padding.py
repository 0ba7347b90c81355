"""The padding token of a sequence classifier that is made of a decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from bone_fx.base.padding import missing_padding
from bone_fx.errors import BaseModelError

PAD = {"pad_token": "<pad>", "eos_token": "</s>"}


def llama(**fields: Any) -> LlamaConfig:
    return LlamaConfig(**{"pad_token_id": None, "eos_token_id": 2, **fields})


@pytest.mark.parametrize(
    ("files", "number"),
    [
        ({"tokenizer_config.json": {"pad_token": "</s>", "eos_token": "</s>"}}, 2),
        (
            {
                "tokenizer_config.json": {
                    "pad_token": {"content": "<pad>", "lstrip": False},
                    "added_tokens_decoder": {"7": {"content": "<pad>"}, "2": {"content": "</s>"}},
                }
            },
            7,
        ),
        (
            {
                "tokenizer_config.json": PAD,
                "tokenizer.json": {"added_tokens": [{"id": 9, "content": "<pad>"}]},
            },
            9,
        ),
    ],
)
def test_the_tokenizer_names_it(files: dict[str, Any], number: int, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    empty = tmp_path / "without"
    empty.mkdir()
    found = missing_padding(llama(), LlamaForSequenceClassification, [empty, tmp_path])
    assert found == {"pad_token_id": number}


def test_several_ends_of_text(tmp_path: Path) -> None:
    content = {"pad_token": "</s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    config = llama(eos_token_id=[5, 6])
    found = missing_padding(config, LlamaForSequenceClassification, [tmp_path])
    assert found == {"pad_token_id": 5}


@pytest.mark.parametrize("content", [{}, PAD])
def test_nobody_names_it(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(BaseModelError, match="set pad_token_id in the base's config"):
        missing_padding(llama(), LlamaForSequenceClassification, [tmp_path])


def test_only_where_it_matters() -> None:
    assert missing_padding(llama(pad_token_id=0), LlamaForSequenceClassification, []) == {}
    assert missing_padding(llama(), LlamaForCausalLM, []) == {}
    encoder = BertConfig(pad_token_id=None)
    assert missing_padding(encoder, BertForSequenceClassification, []) == {}
