"""The padding token of a sequence classifier made of a decoder, which looks for the last token.

Such a model needs `pad_token_id` to run on more than one text; configurations of decoders often
have none, and whoever trained the classifier set it by hand, as the tokenizer beside it says.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bone_fx.base.weight_files import read_json
from bone_fx.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_FIELD = "pad_token_id"


def missing_padding(
    config: PreTrainedConfig, architecture: type[PreTrainedModel], folders: Sequence[Path]
) -> dict[str, int]:
    """`pad_token_id`, if the class needs one and the configuration has none.

    Args:
        config: The base's configuration.
        architecture: The class.
        folders: Where tokenizers may be; the first that names a padding token counts.

    Raises:
        BaseModelError: No tokenizer names one.
    """
    if getattr(config.get_text_config(), _FIELD, None) is not None:
        return {}
    if not architecture.__name__.endswith("ForSequenceClassification"):
        return {}
    if _FIELD not in inspect.getsource(architecture.forward):
        return {}
    for folder in folders:
        token = _padding_of(folder, config.get_text_config().eos_token_id)
        if token is not None:
            return {_FIELD: token}
    raise BaseModelError(
        f"{architecture.__name__} needs a padding token to find the last token of each text",
        expected=f"{_FIELD} in config.json, or a tokenizer that names one",
        found=f"none in {', '.join(str(folder) for folder in folders)}",
        next_step=f"set {_FIELD} in the base's config.json to what it was in training",
    )


def _padding_of(folder: Path, eos: int | list[int] | None) -> int | None:
    """The number of the padding token that a folder's tokenizer names; None if it names none."""
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    token = _text(settings.get("pad_token"))
    if token is None:
        return None
    decoder = settings.get("added_tokens_decoder")
    added = list(decoder.items()) if isinstance(decoder, Mapping) else []
    whole = folder / "tokenizer.json"
    listed = read_json(whole).get("added_tokens") if whole.is_file() else None
    if isinstance(listed, list):
        added += [(entry.get("id"), entry) for entry in listed if isinstance(entry, Mapping)]
    numbers = [number for number, entry in added if _text(entry) == token]
    if numbers:
        return int(numbers[0])
    if token == _text(settings.get("eos_token")):
        return eos[0] if isinstance(eos, list) else eos
    return None


def _text(token: object) -> str | None:
    content = token.get("content") if isinstance(token, Mapping) else token
    return content if isinstance(content, str) else None
