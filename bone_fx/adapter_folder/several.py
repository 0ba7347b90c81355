"""Several adapters by the names that they go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bone_fx.adapter_folder.folder import AdapterFolder
from bone_fx.adapter_folder.reading import read_adapter
from bone_fx.errors import UsageError

Adapters = Sequence[tuple[str, AdapterFolder]]
"""Adapters by name, in the order in which they apply."""


def read_adapters(
    paths: Sequence[str | Path] | Mapping[str, str | Path],
) -> list[tuple[str, AdapterFolder]]:
    """Several adapter folders with the names they go by: given ones, or those of `adapter_names`.

    Raises:
        UsageError: A folder is given twice.
        AdapterError: A folder holds no adapter that can be used.
    """
    if not isinstance(paths, Mapping):
        paths = dict(zip(adapter_names(paths), paths, strict=True))
    folders = {name: Path(path).resolve() for name, path in paths.items()}
    if len(set(folders.values())) < len(folders):
        _refuse_twice(list(folders.values()))
    return [(name, read_adapter(path)) for name, path in paths.items()]


def adapter_names(paths: Sequence[str | Path]) -> list[str]:
    """The names that adapters go by which were given none.

    One is `default`. Several have their folders' names, with as many of the folders above as tell
    them apart: `run1/checkpoint-500` and `run2/checkpoint-500`.

    Raises:
        UsageError: A folder is given twice, or one is given without a list around it.
    """
    if isinstance(paths, str | Path):
        raise UsageError(
            "adapters is one path",
            expected="a list of folders, or a dict of names and folders",
            found=repr(str(paths)),
            next_step=f"adapters=[{str(paths)!r}]",
        )
    folders = [Path(path).resolve() for path in paths]
    if len(set(folders)) < len(folders):
        _refuse_twice(folders)
    return ["default"] if len(paths) == 1 else [_name_among(f, folders) for f in folders]


def _refuse_twice(folders: Sequence[Path]) -> None:
    twice = next(folder for folder in folders if folders.count(folder) > 1)
    raise UsageError(
        f"the adapter {twice} is given twice",
        next_step="name it once: an adapter applies once",
    )


def _name_among(folder: Path, folders: Sequence[Path]) -> str:
    """The shortest end of a folder's path that no other folder's path has."""
    ends = (folder.parts[-count:] for count in range(1, len(folder.parts)))
    own = next(
        (
            end
            for end in ends
            if not any(f.parts[-len(end) :] == end for f in folders if f != folder)
        ),
        folder.parts,
    )
    return "/".join(own)
