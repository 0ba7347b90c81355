"""Nodes of one more layer, operator by operator."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.capture.decoder.decoders import DECODERS
from tests.capture.decoder.decoding import capture_of, captured, captured_onnx, onnx_of
from tests.tiers import slow

ROW = {row.name: row for row in DECODERS}

OF_A_LAYER = {
    "opt": "4 MatMul, 4 Add, 2 SkipLayerNormalization, 1 GroupQueryAttention, 1 Relu",
    "gpt_neox_partial": (
        "4 MatMul, 4 Add, 1 LayerNormalization, 1 GroupQueryAttention, 1 BiasGelu, "
        "1 SkipLayerNormalization"
    ),
    "phi": "4 MatMul, 4 Add, 1 GroupQueryAttention, 1 FastGelu, 1 SkipLayerNormalization",
    "qwen3": (
        "5 MatMul, 4 Reshape, 2 SimplifiedLayerNormalization, 2 SkipSimplifiedLayerNormalization, "
        "2 Mul, 1 Split, 1 GroupQueryAttention, 1 Sigmoid"
    ),
    "gemma3_text": (
        "5 MatMul, 4 SimplifiedLayerNormalization, 4 Reshape, 2 SkipSimplifiedLayerNormalization, "
        "1 Mul, 1 Split, 1 GroupQueryAttention, 1 FastGelu"
    ),
}


@pytest.mark.parametrize("name", ["opt", "gemma3_text", *slow("gpt_neox_partial", "phi", "qwen3")])
def test_nodes_of_a_layer(name: str) -> None:
    two = captured(name).model
    kinds = getattr(two.config, "layer_types", None)
    changes = {"layer_types": list(kinds) * 2} if kinds else {}
    four = ROW[name].build(num_hidden_layers=4, **changes)
    few, many = (
        Counter(node.op_type for node in model.graph)
        for model in (captured_onnx(name), onnx_of(capture_of(four), four))
    )
    two_layers = many - few
    assert not few - many
    expected = (part.split() for part in OF_A_LAYER[name].split(", "))
    assert two_layers == Counter({operator: 2 * int(number) for number, operator in expected})
