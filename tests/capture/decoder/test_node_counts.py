"""Nodes of one more layer, operator by operator."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.capture.decoder.decoders import DECODERS
from tests.capture.decoder.decoding import capture_of, captured, onnx_of

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


@pytest.mark.parametrize("name", OF_A_LAYER)
def test_nodes_of_a_layer(name: str) -> None:
    counts = []
    for layers in (2, 4):
        kinds = getattr(ROW[name].build().config, "layer_types", None)
        changes = {"layer_types": (list(kinds) * layers)[:layers]} if kinds else {}
        model, capture = captured(name)
        if layers != 2:
            model = ROW[name].build(num_hidden_layers=layers, **changes)
            capture = capture_of(model)
        counts.append(Counter(node.op_type for node in onnx_of(capture, model).graph))
    few, many = counts
    two_layers = many - few
    assert not few - many
    expected = (part.split() for part in OF_A_LAYER[name].split(", "))
    assert two_layers == Counter({operator: 2 * int(number) for number, operator in expected})
