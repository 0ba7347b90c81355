"""Folded checkpoints of the LoRA family: PEFT's merged weights, and its unmerged logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import bone_fx
from bone_fx.errors import FoldError
from tests.lora.peft_cases import ROWS, make


def _loaded(folder: Path, task: str = "CAUSAL_LM") -> Any:
    classes = {"SEQ_CLS": AutoModelForSequenceClassification}
    loaded: Any = classes.get(task, AutoModelForCausalLM).from_pretrained(folder)
    return loaded.eval()


_LONG = ("saved head of a tied pair", "tied pair trained as one", "tokens of both sides", "layers")
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if name in _LONG else name
    for name, row in ROWS.items()
    if row.folds
]


@pytest.mark.parametrize("name", NAMES)
def test_is_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    case = make(ROWS[name], tmp_path)
    assert case.effect > 0.01
    bone_fx.fold_checkpoint(case.base, adapters=[case.adapter], output=tmp_path / "out")
    model = _loaded(tmp_path / "out", ROWS[name].fields.get("task_type", "CAUSAL_LM"))
    state = model.state_dict()
    for key, expected in case.merged.items():
        size = max(1.0, float(expected.abs().max()))
        assert float((state[key] - expected).abs().max()) <= 1e-6 * size, key
    with torch.no_grad():
        logits = model(**case.inputs).logits
    size = max(1.0, float(case.logits.abs().max()))
    assert float((logits - case.logits).abs().max()) <= 1e-5 * size


def test_biases_that_peft_did_not_save_are_told(tmp_path: Path) -> None:
    """With `lora_only` PEFT trains biases of its layers and leaves them out of the file."""
    row = replace(ROWS["bias of all"], fields={"target_modules": ["q_proj"], "bias": "lora_only"})
    case = make(row, tmp_path)
    result = bone_fx.fold_checkpoint(case.base, adapters=[case.adapter], output=tmp_path / "out")
    assert any("bias=lora_only" in note for note in result.warnings)


def test_a_bias_that_the_class_has_no_place_for(tmp_path: Path) -> None:
    case = make(ROWS["lora_bias on a head"], tmp_path)
    with pytest.raises(FoldError, match=r"no place for .*bias") as caught:
        bone_fx.fold_checkpoint(case.base, adapters=[case.adapter], output=tmp_path / "out")
    assert "bone-export" in str(caught.value.next_step)
