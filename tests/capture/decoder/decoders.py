"""Tiny decoders, and what each is to become. A literal table, one row a case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from tests.capture.architectures import BY_NAME

HEAD_16 = {"head_dim": 16}
HALF = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
}

WHOLE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
}


def _longrope(short_up_to: int) -> dict[str, Any]:
    return {
        "original_max_position_embeddings": short_up_to,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + i / 8 for i in range(8)],
            "long_factor": [2.0 + i for i in range(8)],
            "original_max_position_embeddings": short_up_to,
        },
    }


@dataclass(frozen=True)
class Decoder:
    """One row.

    Attributes:
        name: Name of the row.
        architecture: Name of the row in `architectures` with the class and the configuration.
        changes: Fields of the configuration that differ.
        rotary: `inside` the attention operator, as an operator `outside`, or `none` by layer.
        windows: Window of each layer.
        norms: Number of norms recognised (nn.LayerNorm needs no recognition).
        fused: Whether attention is one operator a layer.
    """

    name: str
    architecture: str
    changes: dict[str, Any] = field(default_factory=dict)
    rotary: tuple[str, str] = ("inside", "inside")
    windows: tuple[int | None, int | None] = (None, None)
    norms: int = 5
    fused: bool = True

    def build(self, seed: int = 0, **more: Any) -> transformers.PreTrainedModel:
        """The model in float32 with weights large enough that its logits differ."""
        changes = {"vocab_size": 99, **self.changes, **more}
        row = BY_NAME[self.architecture]
        model = row.build(seed, **changes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
                centre = 1.0 if parameter.dim() == 1 and _multiplies(name, model) else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(centre + spread * noise)
        return model


def _multiplies(name: str, model: torch.nn.Module) -> bool:
    return name.endswith("weight") and "gemma" not in type(model).__name__.lower()


TWO_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
DECODERS: tuple[Decoder, ...] = (
    Decoder("llama", "llama"),
    Decoder("llama_bias", "llama", {"attention_bias": True, "mlp_bias": True}),
    Decoder("llama_tied", "llama", {"tie_word_embeddings": True}),
    Decoder(
        "llama3",
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    Decoder(
        "llama_dynamic",
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    Decoder("llama_head_20", "llama", {"head_dim": 20}, rotary=("outside", "outside"), fused=False),
    Decoder("llama_head_24", "llama", {"head_dim": 24}, rotary=("outside", "outside")),
    Decoder("qwen2", "qwen2"),
    Decoder(
        "qwen2_window",
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        windows=(None, 6),
    ),
    Decoder("qwen3", "qwen3", norms=9),
    Decoder(
        "qwen3_yarn",
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        norms=9,
    ),
    Decoder("mistral", "mistral", windows=(6, 6)),
    Decoder(
        "mistral_head_20", "mistral", {"head_dim": 20}, ("outside", "outside"), (6, 6), fused=False
    ),
    Decoder("gemma", "gemma"),
    Decoder("gemma2", "gemma2", {"attn_logit_softcapping": 5.0}, windows=(6, None), norms=9),
    Decoder("gemma3_text", "gemma3_text", TWO_KINDS, windows=(6, None), norms=13),
    Decoder("granite", "granite", {"attention_multiplier": 0.3}),
    Decoder("smollm3", "smollm3", {"no_rope_layers": [1, 0]}, rotary=("inside", "none")),
    Decoder("phi3", "phi3", {"sliding_window": 6}, windows=(6, 6)),
    Decoder("phi3_longrope_short", "phi3", _longrope(20)),
    Decoder("phi3_longrope_long", "phi3", _longrope(3)),
    Decoder("phi3_partial", "phi3", {"head_dim": 32, "hidden_size": 128, **HALF}),
    Decoder("phi", "phi", {"head_dim": 32, "hidden_size": 128, **HALF}, norms=0),
    Decoder("phi_narrow", "phi", HALF, rotary=("outside", "outside"), norms=0),
    Decoder("stablelm", "stablelm", {"head_dim": 32, "hidden_size": 128, **HALF}, norms=0),
    Decoder(
        "stablelm_qk_norm",
        "stablelm",
        {"head_dim": 32, "hidden_size": 128, "qk_layernorm": True, **HALF},
        norms=0,
    ),
    Decoder("starcoder2", "starcoder2", {"sliding_window": 6}, windows=(6, 6), norms=0),
    Decoder("cohere", "cohere", {"logit_scale": 1.0}, norms=3),
    Decoder("cohere_qk_norm", "cohere", {"use_qk_norm": True, "logit_scale": 1.0}, norms=3),
    Decoder("olmo2", "olmo2", norms=9),
    Decoder("gpt_neox", "gpt_neox", WHOLE, norms=0),
    Decoder("gpt_neox_partial", "gpt_neox", {"hidden_size": 128, **HALF}, norms=0),
    Decoder("gpt_neox_quarter", "gpt_neox", rotary=("outside", "outside"), norms=0),
    Decoder("opt", "opt", rotary=("none", "none"), norms=0),
    Decoder("gpt2", "gpt2", rotary=("none", "none"), norms=0),
    Decoder("bloom", "bloom", rotary=("none", "none"), norms=0, fused=False),
    Decoder("falcon", "falcon", rotary=("outside", "outside"), norms=0, fused=False),
    Decoder(
        "falcon_heads",
        "falcon",
        {"multi_query": False},
        rotary=("outside", "outside"),
        norms=0,
        fused=False,
    ),
    Decoder(
        "falcon_alibi", "falcon", {"alibi": True}, rotary=("none", "none"), norms=0, fused=False
    ),
    Decoder(
        "falcon_new",
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        rotary=("outside", "outside"),
        norms=0,
        fused=False,
    ),
    Decoder("gpt_neo", "gpt_neo", rotary=("none", "none"), norms=0, fused=False),
    Decoder("nemotron", "nemotron", rotary=("outside", "outside"), norms=5),
    Decoder("olmo", "olmo", norms=0),
    Decoder("mixtral", "mixtral"),
    Decoder("qwen3_moe", "qwen3_moe", norms=9),
    Decoder("gpt_oss", "gpt_oss", windows=(6, None)),
)

CORE = (
    *("llama", "llama_head_20", "qwen2_window", "gemma3_text", "smollm3", "phi3"),
    *("phi3_longrope_long", "cohere", "gpt_neox", "opt", "gpt2", "bloom", "falcon_new"),
    *("gpt_neo", "mixtral", "gpt_oss"),
)
"""The rows of every run: windows, layer types, caps, tables, partial and foreign rotary embeddings,
learned positions, ALiBi, packed projections, experts, sinks."""
