"""Adapters as a person names them: `DIR`, or `NAME=DIR`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import PurePath

from bone_fx.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}", re.ASCII)


def named_adapters(given: Sequence[str]) -> list[str] | dict[str, str]:
    """The adapters as they were given, by name as soon as one has a name.

    Those without one then go by their folder's name.

    Raises:
        UsageError: Two have the same name.
    """
    pairs = [_split(each) for each in given]
    if not any(name for name, _ in pairs):
        return [folder for _, folder in pairs]
    named = [(name or _name_of(folder), folder) for name, folder in pairs]
    names = [name for name, _ in named]
    for name, folder in named:
        if names.count(name) > 1:
            raise UsageError(
                f"two adapters are called {name}",
                expected="names that tell them apart",
                next_step=f"--adapter NAME={folder}, with a name of its own for each",
            )
    return dict(named)


def named_variants(given: Sequence[str]) -> dict[str, str]:
    """Names and folders of `NAME=DIR`.

    Raises:
        UsageError: One has no name or no folder, or two have the same name.
    """
    pairs = [each.partition("=") for each in given]
    names = [name for name, _, _ in pairs]
    for each, (name, _, folder) in zip(given, pairs, strict=True):
        if not name or not folder or names.count(name) > 1:
            raise UsageError(
                f"--variant {each} does not name a variant",
                expected="NAME=DIR, each name once",
                next_step="--variant poet=./poet-adapter",
            )
    return {name: folder for name, _, folder in pairs}


def _split(given: str) -> tuple[str, str]:
    """Name and folder; no name where there is none, or where the whole is a path."""
    name, sign, folder = given.partition("=")
    is_named = bool(sign) and bool(_NAME.fullmatch(name)) and not os.path.lexists(given)
    if is_named and not folder:
        raise UsageError(
            f"--adapter {given} names no folder",
            expected="[NAME=]DIR",
            next_step=f"--adapter {name}=./my-adapter",
        )
    return (name, folder) if is_named else ("", given)


def _name_of(folder: str) -> str:
    """The last part of a path or a hub id."""
    return PurePath(os.path.abspath(folder)).name.partition("@")[0]
