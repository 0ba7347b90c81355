"""The head of a GGUF file, read within its bounds before a library reads it without.

Layout (ggml's gguf.md): magic, version, number of tensors, number of values, the values, then of
each tensor name, shape, type and place. All little-endian.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bone_fx.errors import BaseModelError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Formats of `struct` by the number that the file has for a type."""
_STRING, _ARRAY = 8, 9
_MOST_BYTES = 512 << 20
"""A head is a tokenizer and names of tensors."""
_MOST_DIMENSIONS = 4
_LEAST_BITS = 1
"""Of a weight in the smallest type."""


@dataclass(frozen=True)
class GgufHead:
    """What a GGUF file says of itself.

    Attributes:
        values: Its numbers and texts by name; arrays are left out.
        shapes: Shape of each tensor by name.
    """

    values: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_head(file: Path) -> GgufHead:
    """Read the head of a GGUF file.

    Raises:
        BaseModelError: It does not keep to the format, or claims more than the file has.
    """
    with file.open("rb") as stream:
        content = stream.read(_MOST_BYTES)
    try:
        return _head(_Reader(content), file.stat().st_size)
    except (_BrokenError, struct.error, UnicodeDecodeError) as error:
        raise BaseModelError(
            f"{file} cannot be dequantized: it does not keep to the format",
            found=str(error),
            next_step="download it again",
        ) from error


def _head(reader: _Reader, size: int) -> GgufHead:
    magic, version, tensors, values = reader.take("4sIQQ")
    if magic != b"GGUF" or version not in (2, 3):
        raise _BrokenError(f"version {version} of {magic!r}")
    found = {}
    for _ in range(values):
        name = reader.text()
        value = reader.value(*reader.take("I"))
        if value is not None:
            found[name] = value
    shapes = {}
    for _ in range(tensors):
        name = reader.text()
        (dimensions,) = reader.take("I")
        if dimensions > _MOST_DIMENSIONS:
            raise _BrokenError(f"{name!r} has {dimensions} dimensions")
        shapes[name] = reader.take(f"{dimensions}Q")
        reader.take("IQ")
        if math.prod(shapes[name]) * _LEAST_BITS > 8 * size:
            raise _BrokenError(f"{name!r} of shape {list(shapes[name])} is not in {size} bytes")
    return GgufHead(found, shapes)


class _BrokenError(Exception):
    """A file that does not keep to the format."""


class _Reader:
    """Reads forward; `struct.error` where the bytes end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def take(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{form}", self._content, self._at)
        self._at += struct.calcsize(f"<{form}")
        return values

    def text(self) -> str:
        (length,) = self.take("Q")
        return self._skip(length).decode()

    def value(self, kind: int) -> Any:
        """The value of a type; None for an array, which is skipped."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("IQ")
            if inner in _SCALARS:
                self._skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            elif inner == _STRING:
                for _ in range(count):
                    (length,) = self.take("Q")
                    self._skip(length)
            else:
                raise _BrokenError(f"an array of type {inner}")
            return None
        if kind not in _SCALARS:
            raise _BrokenError(f"a value of type {kind}")
        return self.take(_SCALARS[kind])[0]

    def _skip(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._content):
            raise _BrokenError(f"it ends {end - len(self._content)} bytes before a value does")
        content = self._content[self._at : end]
        self._at = end
        return content
