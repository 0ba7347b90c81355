"""Attention with a cache in int8: nodes, inputs and outputs of the graph, and what is refused."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch

from bone_fx.capture.decoder.capture_decoder import DecoderCapture, capture_decoder
from bone_fx.deploy.builds.calibrate import CacheCalibration
from bone_fx.deploy.builds.kv_cache import (
    HEADROOM,
    past_keys,
    quantize_cache,
    require_quantized_cache,
    scales_of,
)
from bone_fx.errors import ExportError
from bone_fx.onnx.quantize_cache import (
    CacheScales,
    QuantizeCache,
    cached_attention,
    rotated_partners,
    why_not_quantized,
)
from bone_fx.onnx.recipe_tensor import recipe_of
from tests.capture.decoder.decoders import DECODERS
from tests.capture.decoder.decoding import onnx_of

ROW = {row.name: row for row in DECODERS}


def graph_of(name: str, **choices: Any) -> tuple[ir.Model, DecoderCapture]:
    model = ROW[name].build()
    capture = capture_decoder(model, **choices)
    return onnx_of(capture, model), capture


def measured(capture: DecoderCapture) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """A largest key and value for each channel, all of them different."""
    found = {}
    for layer in capture.layers:
        shape = (layer.kv_heads, layer.key_size)
        keys = 1.0 + torch.arange(shape[0] * shape[1]).view(shape)
        found[layer.layer] = (keys + layer.layer, keys / 7)
    return found


def test_attention_keeps_its_cache_in_int8() -> None:
    model, capture = graph_of("llama")
    cache = measured(capture)
    entries = quantize_cache([model], CacheCalibration(cache, {"text": "a"}))
    assert entries == {"dtype": "int8", "scales": "per channel", "layers": 2, "text": "a"}
    cached = [*model.graph.inputs[2:], *model.graph.outputs[1:]]
    assert {v.dtype for v in cached} == {ir.DataType.INT8}
    assert len(cached) == 8
    for name, node in cached_attention(model).items():
        layer = int(name.split(".")[1])
        assert node.attributes.get_string("k_quant_type") == "PER_CHANNEL"
        assert node.attributes.get_int("kv_cache_bit_width") == 8
        for value, largest in zip(node.inputs[12:14], cache[layer], strict=True):
            recipe = recipe_of(value)
            assert recipe is not None
            torch.testing.assert_close(
                recipe.evaluate(), largest.flatten() * HEADROOM / 127, rtol=1e-6, atol=0
            )
    names = list(model.graph.initializers)
    scales = {past_keys(layer): scales_of(*pair) for layer, pair in cache.items()}
    assert not QuantizeCache(scales)(model).modified
    assert list(model.graph.initializers) == names


@pytest.mark.parametrize(
    ("name", "width", "interleaved"),
    [
        ("llama", 16, False),
        ("phi", 16, False),  # half of a head
        ("cohere", 16, True),
        ("nemotron", 8, False),  # the rotary embedding stands outside of the attention
        ("gpt2", 0, False),
    ],
)
def test_channels_that_are_turned_together(name: str, width: int, interleaved: bool) -> None:
    model, capture = graph_of(name)
    partners = rotated_partners(next(iter(cached_attention(model).values())))
    if not width:
        assert partners is None
        return
    assert partners is not None
    half = width // 2
    turned = [i ^ 1 if interleaved else (i + half) % width for i in range(width)]
    assert partners.tolist() == turned + list(range(width, capture.layers[0].key_size))


def test_a_channel_without_use_has_a_scale() -> None:
    largest = torch.tensor([[4.0, 0.0]])
    scales = scales_of(largest, torch.zeros(1, 2))
    assert isinstance(scales, CacheScales)
    assert 0 < float(scales.key[0, 1]) < float(scales.key[0, 0])
    assert float(scales.value.min()) > 0


def test_written_out_attention_is_refused() -> None:
    model, capture = graph_of("bloom")
    with pytest.raises(ExportError, match="attention by itself: it is written out"):
        require_quantized_cache(model, capture.layers, "cpu", in_halves=False)
    model, capture = graph_of("llama", unfused="the provider has no kernel")
    with pytest.raises(ExportError, match="the provider has no kernel"):
        require_quantized_cache(model, capture.layers, "cuda", in_halves=True)
    assert "past_key_values.0.key is no input" in str(why_not_quantized(model, "cpu"))


def test_what_a_kernel_does_not_take_is_refused() -> None:
    model, capture = graph_of("llama")
    node = cached_attention(model)[past_keys(1)]
    require_quantized_cache(model, capture.layers, "cuda", in_halves=True)
    node.resize_inputs(16)
    node.replace_input_with(10, node.inputs[3])
    assert "attention_bias" in str(why_not_quantized(model, "cuda"))
    assert why_not_quantized(model, "cpu") is None
    node.replace_input_with(14, node.inputs[3])
    assert "norms queries and keys" in str(why_not_quantized(model, "cpu"))
    node.replace_input_with(14, None)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 3)
    with pytest.raises(ExportError, match="num_heads"):  # of ONNX Runtime's own kernel
        require_quantized_cache(model, capture.layers, "cpu", in_halves=False)


def test_wide_heads_have_no_kernel_on_cuda() -> None:
    model, _ = graph_of("llama")
    past = cached_attention(model)[past_keys(0)].inputs[3]
    assert past is not None
    past.shape = ir.Shape([None, 2, None, 320])
    assert "at most 256, not 320" in str(why_not_quantized(model, "cuda"))
    assert why_not_quantized(model, "cpu") is None
