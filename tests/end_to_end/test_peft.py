"""Adapters travel between PEFT 0.18.1 and bone_fx, and train the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import bone_fx

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


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_in_float64(method: str) -> None:
    """Same seed, data and optimizer: the same losses, so initialisation, forward and gradients
    agree."""
    fields = METHODS[method]
    losses: dict[str, list[float]] = {}
    for who in ("peft", "ours"):
        model = llama().double()
        torch.manual_seed(7)
        if who == "peft":
            net = in_peft(model, fields, target_modules=TARGETS, task_type="CAUSAL_LM").double()
        else:
            net = bone_fx.adapt(
                model, bone_fx.BoneConfig(target_modules=TARGETS, **fields), batch()
            ).double()
        net.train()
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        losses[who] = []
        for step in range(20):
            loss = net(**batch(step % 3)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[who].append(float(loss.detach()))
    assert losses["ours"][0] - losses["ours"][-1] > 0.1
    for ours, theirs in zip(losses["ours"], losses["peft"], strict=True):
        assert abs(ours - theirs) <= 1e-7
