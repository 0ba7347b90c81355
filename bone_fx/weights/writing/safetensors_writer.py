"""Writing a safetensors file from recipes, band by band."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.storage.safetensors_file import DTYPES
from bone_fx.weights.writing.overflow import refuse_overflow
from bone_fx.weights.writing.stream import Piece, write_stream

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(
    path: Path, recipes: Mapping[str, Recipe], advance: Callable[[int], None] | None = None
) -> str:
    """Write recipes in their order; the same recipes give the same bytes.

    Args:
        path: The file.
        recipes: Recipe by name.
        advance: Told the number of bytes of each write.

    Returns:
        SHA-256 of the file.

    Raises:
        VerificationError: A value that was finite is not in the dtype that it is written in.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    pieces: list[Piece] = []
    end = 0
    for name, recipe in recipes.items():
        start, end = end, end + math.prod(recipe.shape) * recipe.dtype.itemsize
        pieces.append(Piece(name, recipe, start))
        header[name] = {
            "dtype": _NAMES[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    head = len(text).to_bytes(8, "little") + text
    return write_stream(path, pieces, refuse=refuse_overflow, advance=advance, head=head)
