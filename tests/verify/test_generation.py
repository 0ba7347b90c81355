"""onnxruntime-genai's tokens beside the graph's: texts that end, and those that should not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import bone_fx
from bone_fx.verify.decoder.genai_folder import _first_difference
from tests.end_to_end.tiny import tiny_base

END = 9


@pytest.mark.parametrize("place", [0, 1, 4])
def test_a_text_that_ends_after_a_few_tokens(place: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    model: Any = LlamaForCausalLM.from_pretrained(tiny_base(tmp_path / "plain"))
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, 128, (1, 5)))
    tokens = model.generate(prompt, do_sample=False, max_new_tokens=8, eos_token_id=None)
    end = int(tokens[0, 5 + place])
    base = tiny_base(tmp_path / "base", eos_token_id=end)
    result = bone_fx.export(base, output=tmp_path / "out")
    assert "onnxruntime-genai" in result.manifest["verification"]["ran"]


@pytest.mark.parametrize(
    ("tokens", "expected", "place"),
    [
        ([3, 4, 5], [3, 4, 5], None),
        ([3, 4], [3, 4, END], None),
        ([], [END, 5, 6], None),
        ([3, END], [3, END, 5], None),
        ([3], [3, 4, END], 1),
        ([], [3], 0),
        ([3, 5, 6], [3, 4, 6], 1),
        ([3, 5], [3, 4, END], 1),
    ],
)
def test_where_two_generations_differ(
    tokens: list[int], expected: list[int], place: int | None
) -> None:
    assert _first_difference(tokens, expected, [END]) == place
