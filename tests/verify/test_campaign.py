"""A sample of `tools/defects.py`: each is found, and its layer, or its file and field, named."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bone_fx.verify.decoder.routes import Choices
from bone_fx.verify.decoder.running import empty_past, logits_of, outputs_of, routed
from bone_fx.verify.graph import WrittenGraph
from bone_fx.verify.parity import TOLERANCE, difference

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
    ("scores of two experts exchanged", "olmoe_64"),
    ("one expert less", "olmoe_64"),
    ("weights of experts normalized or not", "olmoe_64"),
    ("scores of two groups exchanged", "glm4_moe_64"),
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


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *(("llama", "fp32"), ("gemma3_text", "fp32"), ("tiny", "fp32")),
        *(("olmoe_64", "fp16"), ("glm4_moe_64", "fp16")),
    ],
)
def test_no_false_alarm(model: str, dtype: str, exports: Any) -> None:
    defects.verify(*exports.of(model, dtype))


@pytest.mark.parametrize("model", ["olmoe_64", "glm4_moe_64"])
def test_rounding_sends_tokens_elsewhere_and_the_reference_follows(
    model: str, exports: Any
) -> None:
    folder, base, _ = exports.of(model, "fp16")
    graph = WrittenGraph(folder / "model.onnx", "cpu")
    choices = Choices.of(graph, ())
    session = graph.session(*choices.edits)
    ids = np.random.default_rng(0).integers(3, 99, (1, 96))
    outputs = outputs_of(session, ids, np.ones_like(ids), empty_past(session, 1))
    chosen = [each[0] for each in choices.read(outputs, (1, 96))]
    reference = AutoModelForCausalLM.from_pretrained(base).eval()
    expected, made = routed(reference, ids[0].tolist(), chosen, TOLERANCE["fp16"])
    alone, own = routed(reference, ids[0].tolist(), [], 0.0)
    assert all(torch.equal(one, other) for one, other in zip(chosen, made, strict=True))
    pairs = zip(own, chosen, strict=True)
    assert any(not torch.equal(a.sort(1).values, b.sort(1).values) for a, b in pairs)
    actual = logits_of(outputs)[0]
    assert difference(actual, expected) < 5e-3 < difference(actual, alone)
