"""Small text files of an input folder, which is untrusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bone_fx.errors import InputRefusedError
from bone_fx.files import json_file
from bone_fx.files.json_file import NotJsonError

_AGAIN = "save it again with transformers, or copy it again"
MOST_BYTES = 1 << 28
"""Largest file that is read whole; the largest tokenizers have a tenth of it."""


def read_text(path: Path) -> str:
    """The content of a text file.

    Raises:
        InputRefusedError: It cannot be read, is not UTF-8, or is too large for what it is.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InputRefusedError(
                f"{path} is too large",
                expected=f"at most {MOST_BYTES:,} bytes",
                found=f"{size:,}",
                next_step=_AGAIN,
            )
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputRefusedError(
            f"{path} cannot be read",
            expected="a text in UTF-8",
            found=str(error),
            next_step=_AGAIN,
        ) from error


def read_value(path: Path) -> Any:
    """The value in a JSON file; None if there is no such file.

    Raises:
        InputRefusedError: It cannot be read, or is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json_file.read_value(path)
    except NotJsonError as error:
        raise InputRefusedError(
            f"{path} cannot be read", expected="JSON", found=str(error), next_step=_AGAIN
        ) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is no such file.

    Raises:
        InputRefusedError: It cannot be read, or holds something else.
    """
    content = read_value(path)
    if content is None and not path.is_file():
        return {}
    if not isinstance(content, dict):
        raise InputRefusedError(
            f"{path} cannot be read",
            expected="a JSON object",
            found=type(content).__name__,
            next_step=_AGAIN,
        )
    return content


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as transformers does, with its keys in their order."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
