"""Paths that exist and are spelt nearly like one that does not."""

from __future__ import annotations

import os
from difflib import get_close_matches
from pathlib import Path

_ALIKE = 0.6
"""Share of letters in common, as difflib counts it, from which two names are alike."""


def meant(path: str | Path, otherwise: str) -> str:
    """What to do about a path where nothing is: a question if something is called nearly so.

    Args:
        path: What the person wrote.
        otherwise: The next step where nothing is alike, or where the path exists.
    """
    given = os.path.expanduser(path)
    similar = None if os.path.lexists(given) else _similar(given)
    return otherwise if similar is None else f"did you mean {similar}?"


def _similar(path: str) -> str | None:
    """The path with each part that is not there replaced by one that is and looks like it."""
    folder, name = os.path.split(path.rstrip("/"))
    if folder and not os.path.isdir(folder):
        existing = _similar(folder)
        if existing is None or os.path.lexists(os.path.join(existing, name)):
            return existing and os.path.join(existing, name)
        folder = existing
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return None
    near = get_close_matches(name, names, 1, _ALIKE)
    return os.path.join(folder, near[0]) if near else None
