"""`config.json` of an exported folder: transformers opens it, and it describes the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from bone_fx.errors import LOOK, VerificationError
from bone_fx.verify.parity import Parity

FILE = "config.json"
_OF_TEXT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_OF_MODEL = ("model_type", "tie_word_embeddings", "num_labels", "id2label", "problem_type")


def verify_configuration(
    parity: Parity,
    folder: Path,
    config: Any,
    architecture: str,
    dtype: str,
    *,
    common: bool = False,
) -> None:
    """Compare `config.json` with the configuration of the reference.

    Args:
        parity: Takes the name of the check.
        folder: The folder.
        config: The reference's configuration.
        architecture: Class name of the reference.
        dtype: PyTorch's name of the dtype of the activations.
        common: Whether several graphs have the file in common: then heads may be tied in some.

    Raises:
        VerificationError: A field is another, or transformers does not open the file.
    """
    if not (folder / FILE).is_file():
        parity.skip(FILE, "the folder has none: an earlier version wrote it")
        return
    if config.model_type not in CONFIG_MAPPING:
        parity.skip(FILE, "its class is code of the base, which transformers has not")
        return
    try:
        found = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise VerificationError(
            f"verification failed: {FILE}: transformers does not open it",
            found=f"{type(error).__name__}: {error}",
            next_step=LOOK,
        ) from error
    expected = {**_fields(config), "architectures": [architecture], "dtype": dtype}
    actual = {
        **_fields(found),
        "architectures": found.architectures,
        "dtype": str(found.dtype).removeprefix("torch."),
    }
    if common:
        del expected["tie_word_embeddings"]
    for field, value in expected.items():
        if actual[field] != value:
            raise VerificationError(
                f"verification failed: {FILE}: {field}",
                expected=value,
                found=actual[field],
                next_step=LOOK,
            )
    parity.cases.append(f"{FILE}: {len(expected)} fields")


def _fields(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    return {name: getattr(text, name, None) for name in _OF_TEXT} | {
        name: getattr(config, name, None) for name in _OF_MODEL
    }
