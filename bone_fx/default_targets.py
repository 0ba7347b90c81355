"""Targets by model type, for a configuration that names none.

The table is PEFT 0.18.1's for Bone and MiSS (`peft.utils.constants`); a test compares them. A model
type that is not in it has no default.
"""

from __future__ import annotations

_GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("q_proj", "v_proj"),
        (
            *("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4"),
            *("mistral", "mixtral", "opt", "qwen2", "qwen3", "stablelm"),
        ),
    ),
    (("query", "value"), ("bert", "electra", "layoutlm", "roberta", "xlm-roberta")),
    (
        ("query_key_value",),
        ("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"),
    ),
    (("q", "v"), ("mt5", "t5")),
    (("c_attn",), ("gpt2", "gpt_bigcode")),
    (("q", "v", "q_proj", "v_proj"), ("blip-2",)),
    (("c_proj", "c_attn"), ("btlm",)),
    (("qkv_proj",), ("codegen",)),
    (("in_proj",), ("deberta",)),
    (("query_proj", "value_proj"), ("deberta-v2",)),
    (("Wqkv",), ("mpt",)),
    (("q_proj", "v_proj", "fc1", "fc2"), ("phi",)),
    (("key", "value", "receptance", "output"), ("rwkv",)),
    (("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"), ("rwkv7",)),
)
"""Names of layers, and the model types whose layers are called so."""

DEFAULT_TARGETS: dict[str, list[str]] = {
    model_type: list(targets) for targets, model_types in _GROUPS for model_type in model_types
}
"""Names of layers by `config.model_type`."""
