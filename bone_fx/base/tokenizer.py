"""A tokenizer in the one file that ONNX Runtime's own tokenizers read, made from older files."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SENTENCEPIECE = ("sentencepiece", "google.protobuf")


class TokenizerError(Exception):
    """transformers cannot read a tokenizer; the message says why."""


def cannot_be_read(error: BaseException) -> bool:
    """Whether a tokenizer's file is what is wrong, of what its reader raised.

    The tokenizers library raises bare Exceptions, and a panic of its Rust is none of these.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def write_tokenizer_json(
    vocabulary: Path, config: PreTrainedConfig, target: Path, *, trust_remote_code: bool
) -> None:
    """Convert a tokenizer to `tokenizer.json`, by transformers.

    Args:
        vocabulary: The file with the tokenizer's vocabulary; others stand beside it.
        config: The model's configuration, which says whose tokenizer it is if the files do not.
        target: Folder for `tokenizer.json`, and for `tokenizer_config.json` if it has none.
        trust_remote_code: Whether Python files that come with the tokenizer may be run.

    Raises:
        TokenizerError: The tokenizer cannot be read, or has no such form.
    """
    missing = [name.rpartition(".")[2] for name in _SENTENCEPIECE if find_spec(name) is None]
    if vocabulary.suffix in (".model", ".spm") and missing:
        raise TokenizerError(f"pip install {' '.join(missing)}, and export again")
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            vocabulary.parent,
            config=config,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
        tokenizer.backend_tokenizer.save(str(target / "tokenizer.json"))
        if not (target / "tokenizer_config.json").is_file():
            tokenizer.save_pretrained(target)
    except BaseException as error:
        if not cannot_be_read(error):
            raise
        (target / "tokenizer.json").unlink(missing_ok=True)
        reason = " ".join(str(error).split())[:200]
        raise TokenizerError(f"{type(error).__name__}: {reason}") from error
