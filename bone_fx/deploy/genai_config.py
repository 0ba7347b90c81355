"""What onnxruntime-genai needs beside a decoder: configuration, tokenizer, chat template.

The keys are those of onnxruntime-genai 0.18 (`src/config.cpp`); it refuses keys that it does not
know.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.errors import BaseModelError
from bone_fx.files.json_file import NotJsonError, read_object

if TYPE_CHECKING:
    from bone_fx.capture.decoder.capture_decoder import DecoderCapture

CONFIG_FILE = "genai_config.json"
DEFAULT_CONTEXT = 2048
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)
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
    config: Any,
    capture: DecoderCapture,
    tokenizer_source: Path,
    *,
    provider: str = "cpu",
) -> list[str]:
    """Makes a folder with `model.onnx` one that onnxruntime-genai runs.

    Args:
        folder: The folder to complete.
        config: The model's configuration.
        capture: The decoder that the model was made from.
        tokenizer_source: The base's folder, with tokenizer, chat template and
            generation_config.json.
        provider: `cpu` or `cuda`.

    Returns:
        What a person should know: a tokenizer or a chat template that is not there.

    Raises:
        BaseModelError: generation_config.json cannot be read.
    """
    generation = _read_json(tokenizer_source / "generation_config.json")
    content = genai_config(config, capture, generation, provider=provider)
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
    return copy_tokenizer(tokenizer_source, folder)


def copy_tokenizer(source: Path, folder: Path) -> list[str]:
    """Copies tokenizer and chat template; returns warnings about what is missing."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, folder / name)
    if "tokenizer.json" not in names:
        return [f"{source.name} has no tokenizer.json: onnxruntime-genai gets token ids only"]
    templates = source / "chat_template.jinja", source / "tokenizer_config.json"
    if not any(
        path.is_file() and "chat_template" in (path.name + path.read_text("utf-8"))
        for path in templates
    ):
        return [f"{source.name} has no chat template: prompts are passed as they are"]
    return []


def genai_config(
    config: Any, capture: DecoderCapture, generation: dict[str, Any], *, provider: str = "cpu"
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    Args:
        config: The model's configuration.
        capture: The decoder.
        generation: The content of generation_config.json, which has precedence over the
            configuration; may be empty.
        provider: `cpu` or `cuda`.
    """
    text = config.get_text_config()
    first = capture.layers[0]
    context = capture.context_length or DEFAULT_CONTEXT
    eos = _token(generation, config, "eos_token_id")
    pad = _token(generation, config, "pad_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    tokens = {
        "bos_token_id": _token(generation, config, "bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
    }
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
            "provider_options": [] if provider == "cpu" else [{provider: {}}],
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


def _token(generation: dict[str, Any], config: Any, name: str) -> int | list[int] | None:
    token = generation.get(name)
    if token is None:
        token = getattr(config.get_text_config(), name, None)
    if isinstance(token, list):
        numbers = [int(t) for t in token]
        return numbers[0] if len(numbers) == 1 else numbers or None
    return None if token is None else int(token)


def _plain(value: object, default: float) -> float | int | bool:
    """A search option of the default's type, or the default where the file says something else."""
    if isinstance(value, bool) or isinstance(default, bool):
        return value if isinstance(value, bool) and isinstance(default, bool) else default
    return type(default)(value) if isinstance(value, int | float) else default


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except NotJsonError as error:
        raise BaseModelError(
            f"{path} cannot be read", expected="a JSON object", found=str(error)
        ) from error
