"""The files that a run reads: none may be overwritten or deleted by it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def files_read(
    base: object,
    adapters: Sequence[str | Path] = (),
    texts: Iterable[str | Path | None] = (),
) -> list[Path]:
    """Everything that a run reads: folders, and what stands in them and in their subfolders.

    Args:
        base: What the caller gave as the base; a module of the user's own has no files.
        adapters: Adapter folders.
        texts: Other files: calibration, samples.
    """
    given = [*adapters, *(text for text in texts if text is not None)]
    if isinstance(base, str | Path):
        given += [base, *_caches(Path(base).expanduser())]
    named = [path for each in given for path in _inside(Path(each).expanduser())]
    return [path for path in named if os.path.lexists(path)]


def _inside(path: Path) -> list[Path]:
    """A file, or a folder with what stands in it and in its subfolders."""
    if not os.path.isdir(path):
        return [path]
    return [path, *path.glob("*"), *path.glob("*/*")]


def _caches(base: Path) -> list[Path]:
    """Where a base's files lie that is a hub id or holds a GGUF file."""
    from bone_fx.base.gguf import LAYOUT
    from bone_fx.base.hub import cache_folder
    from bone_fx.base.loading import cache_root

    if not os.path.lexists(base):
        return [cache_folder()]
    return sorted(cache_root().glob(f"{LAYOUT}-*"))
