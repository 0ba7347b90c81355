"""A call may bring inputs that nobody named: `position_ids` of packed rows, `token_type_ids`."""

from __future__ import annotations

import copy
import functools
from typing import Any

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import bone_fx
from bone_fx.errors import CaptureError, InputRefusedError, UsageError
from bone_fx.train import origin
from tests.train.peft_models import in_peft, llama

IDS = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(3))
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
PACKED = {"input_ids": IDS, "position_ids": PLACES, "use_cache": False}
CONFIG = peft.MissConfig(r=8, target_modules=["q_proj"], init_weights=True)


@functools.cache
def pair(chosen: bool = False) -> tuple[bone_fx.AdaptedModule, Any]:
    """One adapter, ours and PEFT's, on one model; the tests share them."""
    model = llama(use_cache=True)
    theirs = in_peft(copy.deepcopy(model), CONFIG)
    ours = bone_fx.get_peft_model(
        model, CONFIG, example_inputs={"input_ids": IDS} if chosen else None
    )
    torch.manual_seed(5)
    for mine, other in zip(blocks(ours), blocks(theirs), strict=True):
        torch.nn.init.normal_(mine, std=0.3)
        other.data.copy_(mine)
    return ours, theirs


def blocks(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def assert_same(ours: Any, theirs: Any, inputs: dict[str, Any]) -> None:
    for module in (ours, theirs):
        module.zero_grad()
        module(**inputs).logits.square().mean().backward()
    torch.testing.assert_close(ours(**inputs).logits, theirs(**inputs).logits, rtol=0, atol=1e-6)
    for mine, other in zip(blocks(ours), blocks(theirs), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-6)


def test_packed_rows_are_kept_apart_as_under_peft() -> None:
    ours, theirs = pair()
    ours.gradient_checkpointing_enable()
    parameters = blocks(ours)
    plain = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # a trainer's first call
        ours(**PACKED)
    for inputs in (PACKED, plain, PACKED | plain, {"input_ids": IDS}, PACKED):
        assert_same(ours, theirs, inputs)
    assert blocks(ours) == parameters
    assert ours.training
    assert ours.is_gradient_checkpointing
    joined = ours(**PACKED | plain).logits
    assert (ours(**PACKED).logits - joined).abs().max() > 1e-3
    with ours.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(ours(**PACKED).logits, theirs(**PACKED).logits)
    ours.gradient_checkpointing_disable()
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(twin(**plain).logits, ours(**plain).logits, rtol=0, atol=0)


def test_bounds_of_packed_rows_say_the_same() -> None:
    ours, _ = pair()
    ends = torch.tensor([0, 4, 7, 9], dtype=torch.int32)
    bounds = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 4, "max_length_k": 4}
    expected = ours(**PACKED).logits
    torch.testing.assert_close(ours(**PACKED, **bounds).logits, expected, rtol=0, atol=0)
    with pytest.raises(UsageError, match="cu_seq_lens_q"):
        ours(input_ids=IDS, **bounds)  # without places nothing says where a sequence begins


def test_restarts_that_transformers_reads_as_one_sequence_are_refused() -> None:
    ours, _ = pair()
    with pytest.raises(InputRefusedError, match="use_cache=False"):
        ours(input_ids=IDS, position_ids=PLACES)


def test_packed_rows_under_a_layer_with_a_state_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, _ = pair()
    kinds = ["linear_attention", "full_attention"]
    monkeypatch.setattr(ours.config, "layer_types", kinds, raising=False)
    with pytest.raises(UsageError, match="packing=False"):
        ours(**PACKED)


def test_segments_of_a_text() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    model = BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4))
    model.train(mode=False)
    config = bone_fx.BoneConfig(r=8, target_modules=["query"])
    adapted = bone_fx.get_peft_model(model, config)
    segments = {"input_ids": IDS, "token_type_ids": (IDS > 30).long()}
    expected = model(**segments).logits
    torch.testing.assert_close(adapted(**segments).logits, expected, rtol=0, atol=1e-6)
    assert (adapted(input_ids=IDS).logits - expected).abs().max() > 1e-3


def test_a_long_call_is_traced_by_its_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    seen = {}
    trace = origin.capture_training

    def watched(model: Any, examples: dict[str, Any], **options: Any) -> Any:
        seen.update({n: None if v is None else list(v.shape) for n, v in examples.items()})
        return trace(model, examples, **options)

    monkeypatch.setattr(origin, "capture_training", watched)
    wide = {"inputs_embeds": torch.randn(5, 40, 32), "position_ids": torch.arange(40)[None]}
    expected = ours.get_base_model()(**wide, attention_mask=torch.ones(5, 40)).logits
    with ours.disable_adapter():
        torch.testing.assert_close(ours(**wide).logits, expected, rtol=0, atol=1e-6)
    assert seen == {"inputs_embeds": [2, 7, 32], "position_ids": [1, 7]}


def test_chosen_inputs_stay_as_they_are() -> None:
    ours, _ = pair(chosen=True)
    with pytest.raises(UsageError, match="capture again with position_ids"):
        ours(**PACKED)


def test_a_call_that_does_not_fit_changes_nothing() -> None:
    ours, theirs = pair()
    with pytest.raises(CaptureError, match="input_ids"):
        ours(position_ids=PLACES)
    with pytest.raises(UsageError, match="foo"):
        ours(input_ids=IDS, foo=IDS)
    assert_same(ours, theirs, {"input_ids": IDS})
