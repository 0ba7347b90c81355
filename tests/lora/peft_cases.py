"""LoRA-family adapters on tiny models, trained, saved, run and merged by PEFT itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCABULARY = 103
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers with grouped heads."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


def tied() -> LlamaForCausalLM:
    """The same with one table for embeddings and head."""
    return llama(tie_word_embeddings=True)


def biased() -> LlamaForCausalLM:
    """The same with a bias in every projection of the attention."""
    model = llama(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def grown() -> LlamaForCausalLM:
    """The same with five more tokens than its checkpoint has."""
    return _with_more_tokens(llama(), 5)


def tied_and_grown() -> LlamaForCausalLM:
    """One table for embeddings and head, with three more tokens than its checkpoint has."""
    return _with_more_tokens(tied(), 3)


def _with_more_tokens(model: LlamaForCausalLM, more: int) -> LlamaForCausalLM:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(VOCABULARY + more)
    return model


def gpt2() -> GPT2LMHeadModel:
    """A GPT-2, whose layers keep their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=3,
        n_positions=64,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config)


def bert() -> BertForSequenceClassification:
    """A BERT with a classifier of four labels."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        num_labels=4,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def mixtral(**changes: Any) -> MixtralForCausalLM:
    """A Mixtral of four experts, which its checkpoint keeps apart."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    return MixtralForCausalLM(MixtralConfig(**{**fields, **changes}))


def gpt_oss() -> GptOssForCausalLM:
    """A gpt-oss, whose checkpoint keeps experts stacked, and their weights transposed."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return GptOssForCausalLM(config)


@dataclass(frozen=True)
class Row:
    """One case.

    Attributes:
        base: Builds the base model.
        fields: Of PEFT's `LoraConfig`.
        merges: Whether PEFT's merged weights are right: it merges no bias into a layer without
            one, and into a tied table what acts on one side of it.
        folds: Whether a checkpoint of the base's class can hold the result.
        saved_base: Builds what stands on disk, if it is another than the base.
    """

    base: Callable[[], Any]
    fields: dict[str, Any]
    merges: bool = True
    folds: bool = True
    saved_base: Callable[[], Any] | None = None


ROWS: dict[str, Row] = {
    "lora": Row(llama, {"target_modules": ["q_proj", "up_proj", "down_proj"]}),
    "rslora with patterns": Row(
        llama,
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3, r"layers\.\d+\.mlp\.(up|gate)_proj": 9, "up_proj": 2},
            "alpha_pattern": {"0.self_attn.o_proj": 20, "_proj": 1, "q_proj": 7},
        },
    ),
    "dora": Row(llama, {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "conv1d": Row(gpt2, {"target_modules": ["c_attn", "c_fc", "attn.c_proj"]}),
    "dora of conv1d": Row(gpt2, {"target_modules": ["c_attn", "c_fc"], "use_dora": True}),
    "lora_bias": Row(biased, {"target_modules": ["v_proj", "o_proj"], "lora_bias": True}),
    "lora_bias without a bias": Row(
        llama, {"target_modules": ["v_proj", "up_proj"], "lora_bias": True}, merges=False
    ),
    "lora_bias on a head": Row(
        llama, {"target_modules": ["lm_head"], "lora_bias": True}, merges=False, folds=False
    ),
    "bias of all": Row(biased, {"target_modules": ["q_proj"], "bias": "all"}),
    "embeddings": Row(llama, {"target_modules": ["embed_tokens", "v_proj"]}),
    "dora of embeddings": Row(llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied embeddings": Row(tied, {"target_modules": ["embed_tokens", "v_proj"]}, merges=False),
    "tied head": Row(tied, {"target_modules": ["lm_head", "v_proj"]}, merges=False),
    "tied pair saved": Row(
        tied, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "tokens": Row(llama, {"target_modules": ["v_proj"], "trainable_token_indices": [5, 99, 31]}),
    "tokens of a tied pair": Row(
        tied, {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [7, 0]}}
    ),
    "resized vocabulary": Row(grown, {"target_modules": ["v_proj"]}, saved_base=llama),
    "layers": Row(
        llama,
        {
            "target_modules": ATTENTION,
            "layers_to_transform": [1],
            "layers_pattern": "layers",
            "exclude_modules": ["k_proj"],
        },
    ),
    "a head": Row(bert, {"target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "experts": Row(
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.down_proj", "mlp.experts.gate_up_proj"],
            "rank_pattern": {"experts.down_proj": 2},
        },
    ),
    "saved head of a tied pair": Row(
        tied, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}, merges=False
    ),
    "tied pair trained as one": Row(
        tied,
        {
            "target_modules": ["v_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        merges=False,
    ),
    "resized embeddings of a tied pair": Row(
        tied_and_grown,
        {"target_modules": ["v_proj", "embed_tokens"]},
        merges=False,
        saved_base=tied,
    ),
    "tokens of both sides": Row(
        llama,
        {
            "target_modules": ["v_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 31], "lm_head": [7, 99]},
        },
        merges=False,
    ),
    "experts that are stored stacked": Row(
        gpt_oss,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
    "a router": Row(mixtral, {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
    "one parameter of experts": Row(
        mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}
    ),
}


@dataclass(frozen=True)
class Case:
    """What PEFT made of a row.

    Attributes:
        base: The base's folder.
        adapter: The adapter's folder.
        inputs: Arguments of the model.
        logits: Of the unmerged model.
        effect: How far the adapter moves the logits.
        merged: PEFT's merged model; empty where it merges wrongly.
    """

    base: Path
    adapter: Path
    inputs: dict[str, Tensor]
    logits: Tensor
    effect: float
    merged: dict[str, Tensor] = field(repr=False)


def make(row: Row, folder: Path, *, dtype: torch.dtype = torch.float32) -> Case:
    """Save a base and an adapter with values away from their initialisation, and run them."""
    model, model_before = row.base(), row.base().eval()
    base, adapter = folder / "base", folder / "adapter"
    (model if row.saved_base is None else row.saved_base()).save_pretrained(base)
    fields = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **row.fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(model, peft.LoraConfig(**fields)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                    parameter.add_(noise).copy_(parameter.to(dtype))
            inputs = _inputs()
            before = model_before(**inputs).logits
            logits = wrapped(**inputs).logits.clone()
        wrapped.save_pretrained(adapter, save_embedding_layers=row.saved_base is not None or "auto")
        merged = wrapped.merge_and_unload().state_dict() if row.merges else {}
    effect = float((logits - before).abs().max())
    return Case(base, adapter, inputs, logits, effect, merged)


def _inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 11), generator=generator)
    ids[0, :4] = torch.tensor([5, 99, 31, 7])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
