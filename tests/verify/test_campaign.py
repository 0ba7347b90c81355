"""A sample of `tools/defects.py`: each is found, and its layer, or its file and field, named."""

from __future__ import annotations

import json
import shutil
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from bone_fx.verify.decoder.genai_folder import verify_generation
from bone_fx.verify.decoder.routes import Choices
from bone_fx.verify.decoder.running import empty_past, logits_of, outputs_of, routed
from bone_fx.verify.graph import WrittenGraph
from bone_fx.verify.parity import TOLERANCE, Parity, difference
from tests.tiers import slow

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
defects: Any = import_module("defects")

SAMPLE = [
    ("norm epsilon", "llama"),
    ("window where there is none", "llama"),
    ("layer types exchanged", "gemma3_text"),
    *slow(
        ("window one wider", "gemma3_text"), ("rotary table of another layer type", "gemma3_text")
    ),
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
    *slow(("scores of two groups exchanged", "glm4_moe_64")),
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


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        *(("llama", "fp32"), ("gemma3_text", "fp32"), ("tiny", "fp32")),
        *(("olmoe_64", "fp16"), *slow(("glm4_moe_64", "fp16"))),
    ],
)
def test_no_false_alarm(model: str, dtype: str, exports: Any) -> None:
    defects.verify(*exports.of(model, dtype))


@pytest.mark.parametrize("model", ["olmoe_64", *slow("glm4_moe_64")])
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
    reference: Any = AutoModelForCausalLM.from_pretrained(base)
    expected, made = routed(reference, ids[0].tolist(), chosen, TOLERANCE["fp16"])
    alone, own = routed(reference, ids[0].tolist(), [], 0.0)
    assert all(torch.equal(one, other) for one, other in zip(chosen, made, strict=True))
    pairs = zip(own, chosen, strict=True)
    assert any(not torch.equal(a.sort(1).values, b.sort(1).values) for a, b in pairs)
    actual = logits_of(outputs)[0]
    assert difference(actual, expected) < 5e-3 < difference(actual, alone)


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is missing")
def test_a_text_that_ends_early_is_no_false_alarm(exports: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(exports.of("olmoe_64", "fp16")[0], tmp_path / "out")
    config = folder / "genai_config.json"
    graph, content = WrittenGraph(folder / "model.onnx", "cpu"), json.loads(config.read_text())
    prompt = np.random.default_rng(0).integers(0, 99, 5).tolist()
    session, tokens = graph.session(), list(prompt)
    for _ in range(4):
        ids = np.array([tokens], dtype=np.int64)
        outputs = outputs_of(session, ids, np.ones_like(ids), empty_past(session, 1))
        tokens.append(int(logits_of(outputs)[0, -1].argmax()))
    content["model"]["eos_token_id"] = tokens[-1]
    config.write_text(json.dumps(content))
    verify_generation(parity := Parity(TOLERANCE["fp16"]), graph)
    assert parity.cases == [f"onnxruntime-genai: {tokens.index(tokens[-1], 5) - 5} tokens"]
