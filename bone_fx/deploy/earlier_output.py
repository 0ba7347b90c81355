"""An output of an earlier run: which of its files that run made, and how it is deleted.

A run knows its own by `bone_export.json`: the files that stand there, with the bytes that they had.
What is not there, or has been changed since, is somebody's work and is never deleted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bone_fx.files.json_file import NotJsonError, read_object
from bone_fx.files.seal import is_sealed
from bone_fx.weights.storage.safetensors_file import file_sha256

MANIFEST = "bone_export.json"
"""The file by which an earlier export is known."""

BESIDE = "also_written"
"""Field of the manifest: pages that it has no bytes of; each says its own checksum."""

REJECTED = "rejected"
"""`kind` of a build that failed verification."""

_HASHED_BYTES = 64 << 20
"""Larger files are weights, which nobody edits: they are known by their size."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier output; None if there is none, or none that a run wrote."""
    path = folder / MANIFEST
    if os.path.islink(path):
        return None
    try:
        content = read_object(path)
    except (FileNotFoundError, NotJsonError):
        return None
    files = content.get("files")
    beside = content.get(BESIDE, [])
    if not isinstance(files, dict) or not isinstance(beside, list):
        return None
    if not all(isinstance(name, str) for name in beside):
        return None
    return content if all(isinstance(entry, dict) for entry in files.values()) else None


def not_made_by_a_run(folder: Path) -> list[str]:
    """Entries of a folder that no run made, or that were changed after it, sorted.

    Names are relative; one that was changed says so. Links are not followed.
    """
    manifest = read_manifest(folder)
    files: Mapping[str, Any] = {} if manifest is None else manifest["files"]
    made = set() if manifest is None else {MANIFEST, *files, *manifest.get(BESIDE, ())}
    parents = {parent.as_posix() for name in made for parent in Path(name).parents}
    foreign: list[str] = []
    for place, folders, names in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in folders:
            path = (here / name).as_posix()
            if path not in parents or (folder / path).is_symlink():
                foreign.append(f"{path}/")
        for name in names:
            path = (here / name).as_posix()
            if path not in made:
                foreign.append(path)
            elif path != MANIFEST and _is_changed(folder / path, files.get(path)):
                foreign.append(f"{path} (changed)")
    return sorted(foreign)


def delete_output(folder: Path) -> bool:
    """Delete what a run made, file by file, then the folder; False if something stays."""
    manifest = read_manifest(folder)
    if manifest is not None:
        made = [*manifest["files"], *manifest.get(BESIDE, ())]
        folders = {parent for name in made for parent in Path(name).parents} - {Path()}
        for name in made:
            if _is_inside(name):
                _unlink(folder / name)
        for inner in sorted(folders, key=lambda path: len(path.parts), reverse=True):
            _rmdir(folder / inner)
        if len(os.listdir(folder)) == 1:
            _unlink(folder / MANIFEST)
    _rmdir(folder)
    return not os.path.lexists(folder)


def files_of(folder: Path, hashed: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Size and SHA-256 of every file of a folder by name.

    Args:
        folder: The folder.
        hashed: SHA-256 of the files that were hashed while they were written.
    """
    hashed = hashed or {}
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    return {
        name: {"bytes": path.stat().st_size, "sha256": hashed.get(name) or file_sha256(path)}
        for path, name in names.items()
    }


def _is_inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _is_changed(path: Path, entry: Mapping[str, Any] | None) -> bool:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return True
    if entry is None:  # a page that holds times, which the manifest has no bytes of
        return status.st_size > _HASHED_BYTES or not is_sealed(path.read_bytes())
    if status.st_size != entry.get("bytes"):
        return True
    return status.st_size <= _HASHED_BYTES and file_sha256(path) != entry.get("sha256")


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return
