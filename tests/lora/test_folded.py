"""Folded checkpoints of the LoRA family: PEFT's merged weights, and its unmerged logits."""

from __future__ import annotations

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


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.folds])
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


def test_a_bias_that_the_class_has_no_place_for(tmp_path: Path) -> None:
    case = make(ROWS["lora_bias without a bias"], tmp_path)
    with pytest.raises(FoldError, match=r"no place for .*bias") as caught:
        bone_fx.fold_checkpoint(case.base, adapters=[case.adapter], output=tmp_path / "out")
    assert "bone-export" in str(caught.value.next_step)
