"""Gates of experts are recognised by what they compute; mixtures run in ONNX Runtime's MoE."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bone_fx.capture.decoder.experts import SwiGlu, recognise_gate
from tests.capture.decoder.decoders import DECODERS
from tests.capture.decoder.decoding import capture_of, differences, onnx_of, session_of
from tests.tiers import slow

TOLERANCE = 1e-5
DECODER = {row.name: row for row in DECODERS}


class Gate(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        result: Tensor = self.function(gate_up)
        return result


def silu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


def limited(gate_up: Tensor) -> Tensor:
    gate, up = gate_up[..., ::2], gate_up[..., 1::2]
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(gate * 1.702) * (up + 1)


def limited_on_one_side(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up.clamp(max=7.0)


def gelu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return nn.functional.gelu(gate) * up


def exchanged(gate_up: Tensor) -> Tensor:
    up, gate = gate_up.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (silu, SwiGlu(1.0, 0.0, None, interleaved=False)),
        (limited, SwiGlu(1.702, 1.0, 7.0, interleaved=True)),
        (gelu, None),
        (exchanged, None),
        (limited_on_one_side, None),
    ],
)
def test_a_gate_is_known_by_its_values(function: Any, expected: SwiGlu | None) -> None:
    assert recognise_gate(Gate(function)) == expected


@pytest.mark.parametrize("normalized", [True, *slow(False)])
def test_mixtures_are_one_operator(normalized: bool) -> None:
    model = DECODER["qwen3_moe"].build(norm_topk_prob=normalized)
    capture = capture_of(model)
    translated = onnx_of(capture, model)
    assert Counter(n.op_type for n in translated.graph)["MoE"] == 2
    assert max(differences(model, capture, session_of(translated)).values()) <= TOLERANCE


def test_experts_with_another_gate_are_written_out() -> None:
    model = DECODER["mixtral"].build(hidden_act="gelu")
    capture = capture_of(model)
    translated = onnx_of(capture, model)
    assert "MoE" not in {n.op_type for n in translated.graph}
    assert max(differences(model, capture, session_of(translated)).values()) <= TOLERANCE


@pytest.mark.slow
def test_experts_chosen_in_another_way_are_written_out() -> None:
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = Glm4MoeForCausalLM(config).eval()
    capture = capture_of(model)
    translated = onnx_of(capture, model)
    assert "MoE" not in {n.op_type for n in translated.graph}
    assert max(differences(model, capture, session_of(translated)).values()) <= TOLERANCE
