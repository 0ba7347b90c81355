"""What onnxruntime-genai needs beside a decoder: configuration, tokenizer, chat template.

The keys are those of onnxruntime-genai 0.18 (`src/config.cpp`); it refuses keys that it does not
know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.deploy.companions.choice import Companions, configured_token
from bone_fx.deploy.companions.copying import copy_for_genai

if TYPE_CHECKING:
    from bone_fx.base.loading import BaseCheckpoint
    from bone_fx.capture.decoder.capture_decoder import DecoderCapture

CONFIG_FILE = "genai_config.json"
DEFAULT_CONTEXT = 2048
_LARGEST = 1 << 31
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH_DEFAULTS: dict[str, float | int | bool] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""Search options that a generation_config.json may set, with genai's own defaults."""


def write_genai_folder(
    folder: Path,
    checkpoint: BaseCheckpoint,
    capture: DecoderCapture,
    companions: Companions,
    *,
    provider: str = "cpu",
    cuda_graph: bool = False,
    session_options: Mapping[str, str] | None = None,
) -> list[str]:
    """Makes a folder with `model.onnx` one that onnxruntime-genai runs.

    Args:
        folder: The folder to complete.
        checkpoint: The base model.
        capture: The decoder that the model was made from.
        companions: Tokenizer, chat template and generation settings.
        provider: `cpu` or `cuda`.
        cuda_graph: Whether its steps are captured as a CUDA graph.
        session_options: Entries of ONNX Runtime's session configuration.

    Returns:
        What a person should know: a tokenizer or a chat template that is not there, token ids that
        an adapter changes.

    Raises:
        InputRefusedError: generation_config.json or a tokenizer's file cannot be read.
    """
    settings, changed = companions.generation_settings(checkpoint.config)
    content = genai_config(
        checkpoint.config, capture, settings, provider=provider, cuda_graph=cuda_graph
    )
    content["model"]["decoder"]["session_options"].update(session_options or {})
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    beyond = [
        f"{name} {token} is no token of the model's {capture.vocab_size} and is left out"
        for name in TOKEN_FIELDS
        if (token := configured_token(settings, checkpoint.config, name)) is not None
        and _in_vocabulary(token, capture.vocab_size) != token
    ]
    return [
        *beyond,
        *companions.token_notes(changed),
        *copy_for_genai(companions, checkpoint, folder),
    ]


def genai_config(
    config: Any,
    capture: DecoderCapture,
    generation: dict[str, Any],
    *,
    provider: str = "cpu",
    cuda_graph: bool = False,
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Args:
        config: The model's configuration.
        capture: The decoder.
        generation: The content of generation_config.json, which has precedence over the
            configuration; may be empty.
        provider: `cpu` or `cuda`.
        cuda_graph: Whether its steps are captured as a CUDA graph.
    """
    text = config.get_text_config()
    first = capture.layers[0]
    context = capture.context_length or DEFAULT_CONTEXT
    tokens = {
        name: _in_vocabulary(configured_token(generation, config, name), capture.vocab_size)
        for name in TOKEN_FIELDS
    }
    if tokens["pad_token_id"] is None:
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    inputs = {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            # the CPU provider takes no options and refuses any
            "provider_options": []
            if provider == "cpu"
            else [{provider: {"enable_cuda_graph": str(int(cuda_graph))}}],
        },
        "filename": "model.onnx",
        "head_size": first.key_size,
        "hidden_size": int(text.hidden_size),
        "inputs": inputs,
        "outputs": outputs,
        "num_attention_heads": first.heads,
        "num_hidden_layers": len(capture.layers),
        "num_key_value_heads": first.kv_heads,
    }
    search = {key: _plain(generation.get(key), default) for key, default in SEARCH_DEFAULTS.items()}
    return {
        "model": {
            **{name: token for name, token in tokens.items() if token is not None},
            "context_length": context,
            "decoder": decoder,
            "type": "decoder",
            "vocab_size": capture.vocab_size,
        },
        "search": {
            **search,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "past_present_share_buffer": capture.share_buffer,
        },
    }


def _in_vocabulary(token: int | list[int] | None, size: int) -> int | list[int] | None:
    """A special token's id, or several; None for those that a vocabulary does not have."""
    tokens = token if isinstance(token, list) else [] if token is None else [token]
    tokens = [each for each in tokens if 0 <= each < size]
    return tokens[0] if len(tokens) == 1 else tokens or None


def _plain(value: object, default: float) -> float | int | bool:
    """A search option of the default's type, or the default where the file says something else."""
    if isinstance(value, bool) or isinstance(default, bool):
        return value if isinstance(value, bool) and isinstance(default, bool) else default
    if not isinstance(value, int | float) or not abs(value) < _LARGEST:
        return default
    return type(default)(value)
