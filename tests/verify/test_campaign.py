"""A sample of `tools/defects.py`: each is found, and its layer, or its file and field, named."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
defects: Any = import_module("defects")

SAMPLE = [
    ("norm epsilon", "llama"),
    ("window where there is none", "llama"),
    ("window one wider", "gemma3_text"),
    ("layer types exchanged", "gemma3_text"),
    ("rotary table of another layer type", "gemma3_text"),
    ("rotary table beyond the prompt", "llama"),
    ("window in a later layer, beyond the prompts", "llama"),
    ("mask ignored", "llama"),
    ("embedding row that no token reads", "llama"),
    ("unadapted weight, one value", "llama"),
    ("layers exchanged", "llama"),
    ("a value of q, k or v", "tiny"),
    ("accuracy level", "llama"),
    ("genai_config.json: model.eos_token_id", "tiny"),
    ("genai_config.json: model.context_length", "tiny"),
    ("another tokenizer", "tiny"),
    ("another chat template", "tiny"),
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return defects.Exports(tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize(("name", "model"), SAMPLE, ids=lambda value: value)
def test_a_defect_is_named(name: str, model: str, exports: Any, tmp_path: Path) -> None:
    defect = next(d for d in defects.DEFECTS if (d.name, d.model) == (name, model))
    result, message = defects.result_of(defect, exports, tmp_path)
    assert result == defects.NAMED, message


@pytest.mark.parametrize("model", ["llama", "gemma3_text", "tiny"])
def test_no_false_alarm(model: str, exports: Any) -> None:
    defects.verify(*exports.of(model, "fp32"))
