"""A tiny Llama and adapters for it, written as transformers and PEFT write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}{% endfor %}"
SITES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
LAYERS = 2


def tiny_base(folder: Path, **changes: Any) -> Path:
    """A Llama with three heads of 16, large enough logits to see a mistake."""
    torch.manual_seed(0)
    fields = {
        "vocab_size": 128,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).save_pretrained(folder)
    return folder


def tiny_adapter(
    folder: Path, *, r: int = 16, width: int = 48, std: float = 0.2, **changes: Any
) -> Path:
    """A Bone adapter on q, k and up of both layers."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    outs = {"self_attn.q_proj": width, "self_attn.k_proj": width, "mlp.up_proj": 80}
    blocks: dict[str, Tensor] = {
        f"base_model.model.model.layers.{i}.{name}.bone_block": std
        * torch.randn(r, outs[name], generator=generator)
        for i in range(LAYERS)
        for name in SITES
    }
    save_file(blocks, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "BONE",
        "r": r,
        "target_modules": [name.rpartition(".")[2] for name in SITES],
        "init_weights": True,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tiny_tokenizer(folder: Path, size: int = 120) -> Path:
    """A byte-pair tokenizer of letters and some pairs, with special tokens and a chat template."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    letters = sorted(set("the quick brown fox jumps over a lazy dog 0123456789.:,<|>"))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=[c for c in letters if c != " "],
        show_progress=False,
    )
    raw.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder
