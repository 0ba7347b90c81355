"""JSON from a file that somebody gave: read within bounds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

_BYTES = 256 << 20
"""More than the index of any checkpoint or the largest tokenizer."""


class NotJsonError(Exception):
    """A file that cannot be read as JSON, or as a JSON object; the text says why."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        FileNotFoundError: There is no file.
        NotJsonError: It is no regular file, cannot be read, or holds something else.
    """
    content = read_value(path)
    if not isinstance(content, dict):
        raise NotJsonError(f"it holds no object but {type(content).__name__}")
    return content


def read_value(path: Path) -> Any:
    """The JSON value that a file holds.

    Raises:
        FileNotFoundError: There is no file.
        NotJsonError: It is no regular file, cannot be read, or is no JSON.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise NotJsonError("it is no regular file")
        if status.st_size > _BYTES:
            raise NotJsonError(f"it has {status.st_size:,} bytes, more than {_BYTES:,}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise NotJsonError(error.strerror or str(error)) from error
    except RecursionError as error:
        raise NotJsonError("it is nested too deeply") from error
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise NotJsonError(str(error)) from error
