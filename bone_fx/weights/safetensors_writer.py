"""Writing a safetensors file from recipes, one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from bone_fx.errors import FoldError
from bone_fx.weights.recipes import Recipe
from bone_fx.weights.safetensors_file import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


def write_safetensors(
    path: Path, recipes: Mapping[str, Recipe], advance: Callable[[int], None] | None = None
) -> str:
    """Write recipes in their order; the same recipes give the same bytes.

    Args:
        path: The file.
        recipes: Recipe by name.
        advance: Told the number of bytes of each tensor that was written.

    Returns:
        SHA-256 of the file.

    Raises:
        FoldError: A recipe gave another tensor than it had promised.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, recipe in recipes.items():
        start, end = end, end + math.prod(recipe.shape) * recipe.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[recipe.dtype],
            "shape": list(recipe.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            while content:
                content = content[file.write(content) :]

        put(len(text).to_bytes(8, "little") + text)
        for name, recipe in recipes.items():
            tensor = recipe.evaluate().contiguous()
            if tuple(tensor.shape) != tuple(recipe.shape) or tensor.dtype != recipe.dtype:
                raise FoldError(
                    f"{name} is not what was planned: {recipe.describe()}",
                    expected=f"{recipe.dtype} {list(recipe.shape)}",
                    found=f"{tensor.dtype} {list(tensor.shape)}",
                )
            content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            put(content)
            if advance is not None:
                advance(len(content))
    return digest.hexdigest()
