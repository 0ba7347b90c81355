"""The files that a run reads: where they lie, so that none is overwritten or deleted by it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bone_fx.adapter_folder import adapter_names


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


def local_adapters(
    given: Sequence[str | Path] | Mapping[str, str | Path],
) -> dict[str, Path]:
    """The folders of adapters by the names they go by; what is a hub id is fetched.

    Args:
        given: Folders in PEFT's layout or hub ids (`owner/name`, `owner/name@revision`), in the
            order in which they apply; by name, or named by `adapter_names`.

    Raises:
        UsageError: A folder is given twice.
        AdapterError: An adapter cannot be fetched.
    """
    if not isinstance(given, Mapping):
        given = dict(zip(adapter_names(given), given, strict=True))
    return {name: local_adapter(adapter) for name, adapter in given.items()}


def local_adapter(given: str | Path) -> Path:
    """The folder of an adapter: the path itself, or where the hub's cache has an id's files.

    Args:
        given: A path or a hub id; what exists on disk is no id.

    Raises:
        AdapterError: The adapter cannot be fetched.
    """
    from bone_fx.base.hub import adapter_id, download_adapter

    folder = Path(given).expanduser()
    named = None if os.path.lexists(folder) else adapter_id(str(given))
    return folder if named is None else download_adapter(*named)


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
