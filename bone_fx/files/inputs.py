"""Folders that somebody gave to be read: what is in them, without following links out of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

_DEPTH = 2
"""Folders of a model have parts in folders (`1_Pooling/`), and these have none."""


def unsafe_entries(folder: Path) -> list[str]:
    """What must not be read of a folder, each with the reason: empty for an ordinary one.

    Pipes, devices and sockets, which block whoever opens them, and links to files outside of the
    folder, but for those of the hub's cache from a snapshot to the blobs beside it.

    Raises:
        OSError: The folder cannot be listed.
    """
    root = Path(os.path.realpath(folder))
    allowed = [root, *_blobs(root)]
    return [
        reason
        for entry in _entries(root, _DEPTH)
        if (reason := _problem(entry, root, allowed)) is not None
    ]


def place_of(path: Path) -> tuple[int, int] | Path:
    """What two names of one file or folder have in common, bind mounts among them.

    Of a path where nothing is, the path.
    """
    try:
        status = os.stat(path)
    except OSError:
        return path
    return status.st_dev, status.st_ino


def is_plain_file(path: Path) -> bool:
    """Whether a path is a regular file, links followed; whatever else it is, nothing is opened."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def _entries(folder: Path, depth: int) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.is_symlink() or not entry.is_dir():
            yield entry
        elif depth > 1 and os.access(entry.path, os.R_OK | os.X_OK):
            yield from _entries(Path(entry.path), depth - 1)


def _blobs(root: Path) -> list[Path]:
    """Where the hub's cache keeps the files of a snapshot, if the folder is one, or in one."""
    snapshots = (place.parent for place in (root, root.parent) if place.parent.name == "snapshots")
    blobs = [folder.parent / "blobs" for folder in snapshots]
    return [folder for folder in blobs if Path(os.path.realpath(folder)) == folder]


def _problem(entry: os.DirEntry[str], root: Path, allowed: list[Path]) -> str | None:
    name = Path(entry.path).relative_to(root).as_posix()
    try:
        mode = entry.stat().st_mode
    except OSError:
        return None  # a link that leads nowhere, or a file that is gone: there is nothing to read
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return f"{name} (no regular file)"
    if not entry.is_symlink():
        return None
    target = Path(os.path.realpath(entry.path))
    if any(target.is_relative_to(place) for place in allowed):
        return None
    return f"{name} (a link to {target})"
