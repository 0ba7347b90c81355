"""Folders that runs write to: caches and the folder for temporary files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bone_fx.deploy.doctor.finding import Finding

ENOUGH_BYTES = 2 << 30
"""Less is too little for the smallest models and their libraries."""


def examine_places() -> list[Finding]:
    """Whether caches can be written, and how much room their disks have."""
    from bone_fx.base.hub import cache_folder
    from bone_fx.base.loading import cache_root

    return [
        *examine_folder(
            "cache for GGUF files and reports", cache_root(), "export BONE_FX_CACHE=FOLDER"
        ),
        *examine_folder("cache of the hub", cache_folder(), "export HF_HOME=FOLDER"),
        *examine_folder(
            "folder for temporary files", Path(tempfile.gettempdir()), "export TMPDIR=FOLDER"
        ),
    ]


def examine_folder(
    name: str, folder: Path, instead: str, enough: int = ENOUGH_BYTES
) -> Iterator[Finding]:
    """Look at one folder, which need not exist yet.

    Args:
        name: What it is.
        folder: Where it is.
        instead: What to type to have it elsewhere.
        enough: Bytes that its disk should have.
    """
    there = next((p for p in (folder, *folder.parents) if os.path.lexists(p)), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is no folder"
        yield Finding("problem", "place", f"the {name} cannot be used: {there} {why}", instead)
        return
    free = shutil.disk_usage(there).free
    room = f"{free / 1e9:.1f} GB free"
    if free < enough:
        yield Finding("problem", "place", f"the {name}, {folder}: only {room}", instead)
    else:
        yield Finding("ok", "place", f"the {name}, {folder}: {room}")
