"""What is refused of adapters that are not read here, by name, with what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONVERT = (
    "convert it with PEFT 0.21's save_as_lora (peft.tuners.lora.conversion), and give that folder"
)
MERGE = "merge it in PEFT (merge_and_unload, save_pretrained), and give that model as the base"
_PROMPT = "export the base without it: it adds tokens to the input, and changes no weight"

CONVERTIBLE = (
    *("ADALORA", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HIRA", "LOHA", "LOKR", "PSOFT"),
    *("RANDLORA", "SHIRA", "TINYLORA", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
)
"""Values of `peft_type` that PEFT 0.21.2 converts to LoRA."""
_PROMPTS = (
    *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING"),
    *("PREFIX_TUNING", "PROMPT_TUNING"),
)

_ON_LOAD = "PEFT changes the base when it loads this folder, and only the adapter is saved"
_SAVE_CONVERTED = (
    "save it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), which"
    " makes it an ordinary LoRA"
)
INITIALISATIONS: Mapping[str, tuple[str, str]] = {
    "pissa": (_ON_LOAD, _SAVE_CONVERTED),
    "olora": (_ON_LOAD, _SAVE_CONVERTED),
    "corda": (_ON_LOAD, _SAVE_CONVERTED),
    "lora_ga": (_ON_LOAD, _SAVE_CONVERTED),
    "loftq": ("it was trained on a base that was quantized in its own way", MERGE),
    "mica": ("PEFT decomposes the base when it loads this folder", MERGE),
}
"""Beginnings of `init_lora_weights` that are refused: why, and what to do."""

FIELDS: Mapping[str, tuple[str, str]] = {
    "alora_invocation_tokens": (
        "aLoRA acts from some tokens on, which no folded weight can",
        "serve it with PEFT or vLLM",
    ),
    "arrow_config": ("Arrow chooses among adapters for each token", "serve it with PEFT"),
    "kasa_config": ("KaSA cuts the base's weights when it is loaded", MERGE),
    "layer_replication": (
        "the adapter was trained on a model whose layers were repeated",
        "save that model with its repeated layers as the base, and the adapter without the field",
    ),
    "megatron_config": ("it was trained on Megatron's parallel layers", "convert it for PEFT"),
    "monteclora_config": ("MonteCLoRA draws its weights at random", MERGE),
    "use_bdlora": ("BD-LoRA keeps its matrices in blocks of their own", MERGE),
    "use_qalora": ("QALoRA averages groups of inputs of a quantized base", MERGE),
    "velora_config": ("VeLoRA changes what its layers read", MERGE),
}
"""Fields that are refused if they are set: why, and what to do."""


def next_step_for(peft_type: object) -> str:
    """What to do with an adapter of another kind."""
    if peft_type in CONVERTIBLE:
        return CONVERT
    return _PROMPT if peft_type in _PROMPTS else MERGE


def is_set(value: Any) -> bool:
    """Whether a field says anything: PEFT writes None, False and empty lists for what is not."""
    return value not in (None, False, 0, "", [], {})
