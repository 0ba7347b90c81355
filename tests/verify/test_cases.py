"""Cases that are chosen from a model, and how outputs are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Phi3Config

import bone_fx
from bone_fx.verify.cases import MORE, SHORT, decoder_cases, edges, rows_of
from bone_fx.verify.decoder.long_texts import verify_long_texts
from bone_fx.verify.graph import WrittenGraph
from bone_fx.verify.parity import Parity, difference
from tests.end_to_end.tiny import tiny_base

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 8,
}


def test_lengths_that_a_configuration_names() -> None:
    gemma = Gemma3TextConfig(sliding_window=37, max_position_embeddings=64)
    assert 37 in edges(gemma, 64)
    assert 37 not in edges(gemma, 37)
    assert edges(LlamaConfig(), None) == []
    phi = Phi3Config(
        rope_parameters=LONGROPE, original_max_position_embeddings=8, max_position_embeddings=64,
        hidden_size=64, num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    assert edges(phi, 64) == [8]


def test_cases_that_a_context_holds() -> None:
    whole = decoder_cases(LlamaConfig(), 4096, short=False)
    assert whole == [*SHORT, *MORE]
    assert decoder_cases(LlamaConfig(), 4096, short=True) == list(SHORT)
    assert all(case.tokens <= 12 for case in decoder_cases(LlamaConfig(), 12, short=False))


def test_no_case_crosses_an_original_context() -> None:
    fields: dict[str, Any] = {"original_max_position_embeddings": 6}
    config = LlamaConfig(**fields)
    for case in decoder_cases(config, 4096, short=False):
        assert case.tokens <= 6 or min(case.lengths) > 6


def test_real_text_stands_in_rows_of_its_own() -> None:
    text = list(range(200))
    assert rows_of(MORE[1], 99, 3, text) == [text[: MORE[1].tokens]]
    random = rows_of(SHORT[1], 99, 1, text)
    assert [len(row) for row in random] == [14, 7, 10]
    assert random[0][0] == 98


def test_small_outputs_are_compared_by_their_own_size() -> None:
    probabilities = torch.full((1, 1000), 1e-3)
    assert difference(torch.zeros_like(probabilities), probabilities) == 1.0
    assert difference(torch.zeros(3), torch.zeros(3)) == 0.0
    assert difference(torch.full((3,), 1e-8), torch.zeros(3)) > 1
    parity = Parity(2e-2, floor=2.0**-14)
    parity.compare(
        "pair", "a difference below fp16's numbers", torch.full((3,), 1e-8), torch.zeros(3)
    )


def test_layers_that_are_not_the_references_are_said_to_differ(tmp_path: Path) -> None:
    base, out = tiny_base(tmp_path / "base"), tmp_path / "out"
    bone_fx.export(base, output=out, verify="off")
    graph, reference = (
        WrittenGraph(out / "model.onnx", "cpu"),
        LlamaForCausalLM.from_pretrained(base),
    )
    parity = Parity(1e-4)
    verify_long_texts(parity, graph, (), reference, 64)
    assert parity.skipped == {}
    reference.model.layers[0].mlp.down_proj.weight.data *= 3
    verify_long_texts(parity, graph, (), reference, 64)
    reason = parity.skipped["long texts"]
    assert reason.startswith("what leaves layer 0 of the graph differs by 0."), reason
