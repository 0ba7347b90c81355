"""Cases of models without a cache: what is compared is what a text has, not its padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    ElectraConfig,
    ElectraModel,
    UMT5Config,
    UMT5EncoderModel,
)

import bone_fx
from tests.tiers import slow


@pytest.mark.parametrize("end", [98, *slow(2)])  # where the end token is, or the largest
def test_a_model_that_pools_at_the_end_token(end: int, tmp_path: Path) -> None:
    config = CLIPTextConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=3,
        vocab_size=99, projection_dim=16, eos_token_id=end, bos_token_id=97, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    CLIPTextModelWithProjection(config).save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out")
    cases = result.manifest["verification"]["ran"]
    assert any("padded left" in case for case in cases)


def test_an_end_token_that_the_vocabulary_has_not(tmp_path: Path) -> None:
    config = ElectraConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=3,
        vocab_size=99, embedding_size=24, eos_token_id=50256,
    )  # fmt: skip
    ElectraModel(config).save_pretrained(tmp_path / "base")
    assert bone_fx.export(tmp_path / "base", output=tmp_path / "out").verified


def test_the_encoder_of_a_pair_takes_one_text(tmp_path: Path) -> None:
    config = UMT5Config(vocab_size=99, d_model=48, d_ff=80, d_kv=16, num_heads=3, num_layers=1)
    assert config.is_encoder_decoder
    UMT5EncoderModel(config).save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out")
    assert list(result.manifest["graph"]["inputs"]) == ["input_ids", "attention_mask"]
