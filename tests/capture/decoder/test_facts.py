"""What a trace has to know is found by one run, as transformers' own cache shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.opt.modeling_opt import OPTAttention

from bone_fx.capture.decoder.capture_decoder import capture_decoder
from bone_fx.capture.decoder.facts import ModelFacts, find_facts
from bone_fx.errors import CaptureError
from tests.capture.decoder.decoders import DECODERS, Decoder
from tests.capture.decoder.decoding import skeleton_of

ROW = {row.name: row for row in DECODERS}
OWN = {"bloom", "falcon", "falcon_heads", "falcon_alibi", "falcon_new", "gpt_neo"}


def facts_of(model: Any) -> ModelFacts:
    skeleton = skeleton_of(model)
    return find_facts(skeleton, skeleton.config)


@pytest.mark.parametrize("row", DECODERS, ids=lambda row: row.name)
def test_shapes_are_those_of_transformers_cache(row: Decoder) -> None:
    model = row.build()
    cache: Any = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 7]]), past_key_values=cache, use_cache=True)
    facts = facts_of(model)
    assert facts.shapes == tuple(
        (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in cache.layers
    )
    assert facts.own_attention == (row.name in OWN)


def test_heads_that_the_configuration_does_not_tell_are_seen() -> None:
    assert facts_of(ROW["gpt_neox"].build(num_key_value_heads=2)).shapes == ((4, 16, 16),) * 2


def test_the_model_is_left_as_it_was() -> None:
    model = skeleton_of(ROW["qwen3_moe"].build())
    before = {name: (type(m), dict(vars(m)), set(m._buffers)) for name, m in model.named_modules()}
    config = model.config.to_dict()
    find_facts(model, model.config)
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert before[name] == (type(module), dict(vars(module)), set(module._buffers))


def test_a_cache_of_another_shape_in_the_trace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = skeleton_of(ROW["opt"].build())
    forward = OPTAttention.forward

    def narrower_in_a_trace(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_exporting():
            self.num_heads, self.head_dim = 8, 8
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(OPTAttention, "forward", narrower_in_a_trace)
    with pytest.raises(CaptureError, match="changes from run to run: the shapes of its cache"):
        capture_decoder(model)


def test_a_model_that_cannot_run_is_refused_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no light")

    monkeypatch.setattr(LlamaAttention, "forward", failing)
    with pytest.raises(
        CaptureError, match="cannot be captured as a decoder: RuntimeError: no light"
    ):
        facts_of(ROW["llama"].build())
