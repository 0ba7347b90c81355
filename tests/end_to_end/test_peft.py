"""Adapters travel between PEFT 0.18.1 and bone_fx, and train the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import bone_fx
from tests.tiers import slow

pytestmark = pytest.mark.usefixtures("captures_once")

METHODS: dict[str, dict[str, Any]] = {
    "bone": {"r": 16, "init_weights": True},
    "bone random": {"r": 20, "init_weights": False},
    "bat": {"r": 8, "init_weights": "bat"},
    "mini": {"r": 14, "init_weights": "mini", "mini_r": 8},
    "miss": {"r": 16, "init_weights": True, "miss_dropout": 0.0, "peft_type": "MISS"},
}
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def phi() -> PhiForCausalLM:
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        use_cache=False,
    )
    return PhiForCausalLM(config)


def in_peft(model: nn.Module, fields: dict[str, Any], **more: Any) -> nn.Module:
    fields = dict(fields)
    is_miss = fields.pop("peft_type", None) == "MISS" or fields["init_weights"] == "mini"
    config_class = peft.MissConfig if is_miss else peft.BoneConfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: nn.Module = peft.get_peft_model(model, config_class(**fields, **more))
    return wrapped


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 96, (3, 9), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("method", ["bone", "mini", *slow("bone random", "bat", "miss")])
def test_peft_loads_what_we_save_and_back(method: str, tmp_path: Path) -> None:
    fields = METHODS[method]
    adapted = bone_fx.adapt(
        llama(), bone_fx.BoneConfig(target_modules=TARGETS, **fields), batch()
    ).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "bone_block" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
        expected = adapted(**batch()).logits.detach()
        torch.testing.assert_close(
            theirs(**batch()).logits.detach(), expected, rtol=1e-5, atol=1e-5
        )
        theirs.save_pretrained(tmp_path / "theirs")
    again = bone_fx.adapt(llama(), tmp_path / "theirs", batch()).eval()
    torch.testing.assert_close(again(**batch()).logits.detach(), expected, rtol=0, atol=0)


def test_heads_travel_too(tmp_path: Path) -> None:
    def bert() -> BertForSequenceClassification:
        torch.manual_seed(0)
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=96,
                hidden_size=48,
                intermediate_size=80,
                num_hidden_layers=2,
                num_attention_heads=3,
                num_labels=5,
            )
        )

    inputs = {"input_ids": batch()["input_ids"], "attention_mask": batch()["attention_mask"]}
    config = bone_fx.BoneConfig(
        r=16, target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"
    )
    model = bert()
    adapted = bone_fx.adapt(model, config, inputs)
    assert adapted.get_parameter("classifier.weight").requires_grad
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert not torch.equal(model.classifier.weight, adapted.get_parameter("classifier.weight"))
    adapted.eval().save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(bert(), tmp_path).eval()
    torch.testing.assert_close(
        theirs(**inputs).logits, adapted(**inputs).logits, rtol=1e-5, atol=1e-5
    )
    again = bone_fx.adapt(bert(), tmp_path, inputs).eval()
    torch.testing.assert_close(again(**inputs).logits, adapted(**inputs).logits, rtol=0, atol=0)


def fifty_losses(
    who: str, model: nn.Module, fields: dict[str, Any], targets: list[str], rate: float
) -> list[float]:
    """Taken of the logits in float64: transformers' own loss is computed in float32."""
    torch.manual_seed(7)
    if who == "peft":
        net = in_peft(model, fields, target_modules=targets, task_type="CAUSAL_LM").double()
    else:
        config = bone_fx.BoneConfig(target_modules=targets, **fields)
        net = bone_fx.adapt(model, config, batch()).double()
    net.train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in range(50):
        given = batch(step % 3)
        labels = given.pop("labels")[:, 1:].flatten()
        logits = net(**given).logits[:, :-1].flatten(0, 1)
        loss = functional.cross_entropy(logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("method", ["bone random", "bat", "mini", *slow("bone", "miss")])
def test_fifty_steps_in_float64(method: str) -> None:
    """Same seed, data and optimizer: the same losses, so initialisation, forward and gradients
    agree, as far as Llama's norms do, which are computed in float32."""
    ours, theirs = (
        fifty_losses(who, llama().double(), METHODS[method], TARGETS, rate=2e-3)
        for who in ("ours", "peft")
    )
    assert ours[0] - ours[-1] > 0.2
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-7


@pytest.mark.parametrize("method", ["bat", *slow("bone", "mini")])
def test_fifty_steps_of_a_model_that_is_float64_throughout(method: str) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "fc1", "fc2"]
    ours, theirs = (
        fifty_losses(who, phi().double(), METHODS[method], targets, rate=1e-2)
        for who in ("ours", "peft")
    )
    assert ours[0] - ours[-1] > 0.2
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-11
