"""Tiny mixtures of experts whose routers differ: softmax, sigmoid, groups, biases; a literal table.

With 64 experts, of which 8 are taken, rounding in fp16 decides the experts of many a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 100,
    "initializer_range": 0.15,
}
_OF_64 = {"num_experts": 64, "num_experts_per_tok": 8}


@dataclass(frozen=True)
class Mixture:
    """A model's class, and the fields of its configuration."""

    name: str
    stem: str
    config: dict[str, Any]

    def build(self, seed: int = 0) -> transformers.PreTrainedModel:
        """The model, with values in those parameters too that begin as zeros."""
        config = getattr(transformers, f"{self.stem}Config")(**{**_SIZES, **self.config})
        torch.manual_seed(seed)
        model: Any = getattr(transformers, f"{self.stem}ForCausalLM")(config)
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                tensor.normal_(0, 0.1)
        return model.eval()  # type: ignore[no-any-return]


MIXTURES = (
    Mixture("qwen3_moe_64", "Qwen3Moe", {**_OF_64, "moe_intermediate_size": 32}),
    Mixture("olmoe_64", "Olmoe", {**_OF_64, "intermediate_size": 32}),
    Mixture("mixtral_8", "Mixtral", {"num_local_experts": 8, "intermediate_size": 96}),
    Mixture("gpt_oss_8", "GptOss", {
        "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 96,
        "sliding_window": 6,
    }),
    Mixture("glm4_moe_64", "Glm4Moe", {
        "n_routed_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 32,
        "intermediate_size": 96, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "n_group": 4, "topk_group": 2,
    }),
)  # fmt: skip
