"""Tiny models of many architectures: hidden 64, 2 layers, random weights; a literal table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 99
SHAPES = ((1, 5), (2, 7), (3, 12), (5, 23))
"""Batch x length that captured graphs are compared at (vision: only the batch varies)."""

Inputs = Callable[[int, int], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Architecture:
    """One row: the model class, the fields of its config, and the inputs that it takes."""

    name: str
    model_class: str
    config_class: str
    config: dict[str, Any]
    inputs: Inputs
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
        """The model, in float32 and evaluation mode as `from_pretrained` leaves it."""
        config = getattr(transformers, self.config_class)(**{**self.config, **overrides})
        for name, value in self.settings.items():
            setattr(config, name, value)
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = getattr(transformers, self.model_class)(config)
        return model.eval()


def text(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens and a mask with a padded last row."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[-1, -max(1, length // 3) :] = 0
    return {
        "input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator),
        "attention_mask": mask,
    }


def two_texts(batch: int, length: int) -> dict[str, torch.Tensor]:
    """The text of an encoder and a shorter one of a decoder."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    decoder = torch.randint(3, VOCABULARY, (batch, max(1, length - 3)), generator=generator)
    return {**text(batch, length), "decoder_input_ids": decoder}


def image(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Images of 3 x 16 x 16."""
    del length
    return {
        "pixel_values": torch.randn(
            batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch)
        )
    }


def audio(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Raw audio of some hundred samples."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {"input_values": torch.randn(batch, 200 + 40 * length, generator=generator)}


def spectrogram(batch: int, length: int) -> dict[str, torch.Tensor]:
    """Whisper's features of a fixed length, and a decoder's text."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return {
        "input_features": torch.randn(batch, 8, 40, generator=generator),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (batch, length), generator=generator),
    }


_TOKENS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 100,
}
_HEAD_16: dict[str, Any] = {**_LLAMA, "head_dim": 16}
_MOE: dict[str, Any] = {**_HEAD_16, "num_experts_per_tok": 2}
_BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 100,
}
_VIT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 5,
}
_ENCODER_DECODER: dict[str, Any] = {
    **_TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "decoder_start_token_id": 2,
}


def _causal(name: str, stem: str, config: dict[str, Any], **settings: Any) -> Architecture:
    return Architecture(name, f"{stem}ForCausalLM", f"{stem}Config", config, text, settings)


def _masked(name: str, stem: str, config: dict[str, Any]) -> Architecture:
    return Architecture(name, f"{stem}ForMaskedLM", f"{stem}Config", config, text)


ARCHITECTURES: tuple[Architecture, ...] = (
    _causal("llama", "Llama", {**_LLAMA, "attention_dropout": 0.1}),
    _causal("qwen2", "Qwen2", _LLAMA),
    _causal("qwen3", "Qwen3", _HEAD_16),
    _causal("qwen3_moe", "Qwen3Moe", {**_MOE, "num_experts": 4, "moe_intermediate_size": 32}),
    _causal("mistral", "Mistral", {**_LLAMA, "sliding_window": 6, "attention_dropout": 0.1}),
    _causal("mixtral", "Mixtral", {**_MOE, "num_local_experts": 4}),
    _causal(
        "mixtral+batched_mm",
        "Mixtral",
        {**_MOE, "num_local_experts": 4},
        _experts_implementation="batched_mm",
    ),
    _causal("gemma", "Gemma", _HEAD_16),
    _causal("gemma2", "Gemma2", {**_HEAD_16, "sliding_window": 6, "attention_dropout": 0.1}),
    Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_HEAD_16, "sliding_window": 6},
        text,
    ),
    _causal("phi", "Phi", {**_LLAMA, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    _causal("phi3", "Phi3", {**_LLAMA, "resid_pdrop": 0.1}),
    Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 100},
        text,
    ),
    _causal("gpt_neox", "GPTNeoX", {**_LLAMA, "hidden_dropout": 0.1}),
    _causal(
        "opt",
        "OPT",
        {
            **_TOKENS,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 100,
            "word_embed_proj_dim": 64,
        },
    ),
    _causal(
        "bloom",
        "Bloom",
        {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1},
    ),
    _causal(
        "falcon",
        "Falcon",
        {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    _causal("olmo2", "Olmo2", _LLAMA),
    _causal("smollm3", "SmolLM3", _LLAMA),
    _causal("granite", "Granite", _LLAMA),
    _causal("stablelm", "StableLm", {**_LLAMA, "hidden_dropout": 0.1}),
    _causal("starcoder2", "Starcoder2", _LLAMA),
    _causal("cohere", "Cohere", _LLAMA),
    _causal("gpt_oss", "GptOss", {**_MOE, "num_local_experts": 4, "sliding_window": 6}),
    _masked("bert", "Bert", _BERT),
    _masked("roberta", "Roberta", {**_BERT, "pad_token_id": 1}),
    _masked("electra", "Electra", {**_BERT, "embedding_size": 32}),
    _masked(
        "modernbert",
        "ModernBert",
        {
            **_LLAMA,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "local_attention": 6,
            "attention_dropout": 0.1,
        },
    ),
    _masked(
        "deberta-v2",
        "DebertaV2",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
        },
    ),
    _masked(
        "distilbert",
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "hidden_dim": 96,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 100,
        },
    ),
    Architecture(
        "bart",
        "BartForConditionalGeneration",
        "BartConfig",
        {**_ENCODER_DECODER, "max_position_embeddings": 100},
        two_texts,
    ),
    Architecture(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_ff": 96,
            "d_kv": 16,
            "num_layers": 2,
            "num_heads": 4,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
        },
        two_texts,
    ),
    Architecture(
        "vit", "ViTForImageClassification", "ViTConfig", {**_VIT, "hidden_dropout_prob": 0.1}, image
    ),
    Architecture(
        "dinov2",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {**_VIT, "hidden_dropout_prob": 0.1},
        image,
    ),
    Architecture(
        "whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **_ENCODER_DECODER,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 100,
            "dropout": 0.1,
        },
        spectrogram,
    ),
    Architecture(
        "wav2vec2",
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "conv_dim": (16, 16),
            "conv_kernel": (10, 3),
            "conv_stride": (5, 2),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            # Both draw from Python while training: they cannot be part of one graph.
            "apply_spec_augment": False,
            "layerdrop": 0.0,
        },
        audio,
    ),
)
"""The survey's table: the architectures whose training capture is promised."""

UNLISTED: tuple[Architecture, ...] = (
    _causal("nemotron", "Nemotron", {**_LLAMA, "attention_dropout": 0.1}),
    _causal("olmo", "Olmo", _LLAMA),
)
"""Architectures that nobody made plans for."""

DECODED: tuple[Architecture, ...] = (
    _causal(
        "gpt_neo",
        "GPTNeo",
        {
            **_TOKENS,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["local", "global"], 1]],
            "window_size": 6,
            "max_position_embeddings": 100,
        },
    ),
)
"""Architectures of the decoders' tests alone.

A training graph of GPT-Neo gives eager's attention weights but for the last bit, and the gradient
of a bias to 1.5e-6 of its largest value, where the others are held to 1e-6.
"""

BY_NAME: dict[str, Architecture] = {row.name: row for row in ARCHITECTURES + UNLISTED + DECODED}

CORE = (
    "llama",
    "mixtral",
    "gpt2",
    "bert",
    "modernbert",
    "vit",
    "whisper",
)
"""The rows of every run: decoders, experts, encoders, encoder-decoders, images, audio."""
