"""Cases of models without a cache: what is compared is what a text has, not its padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

import bone_fx


@pytest.mark.parametrize("end", [98, 2])  # where the end token is, or the largest
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
