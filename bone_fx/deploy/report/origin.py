"""Licence and base of an input, as its own files state them: nothing of it is believed or run.

They stand in the front matter of `README.md`, a model card of the Hugging Face hub. Only the few
fields that are used are parsed: that of a model with many benchmark results has megabytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bone_fx.files.inputs import is_plain_file

CARD = "README.md"
_FIELDS = ("license", "license_name", "license_link", "base_model")
_MOST_BYTES = 8 << 20
_MOST_OF_A_FIELD = 4096
_MOST_VALUES, _MOST_CHARACTERS = 8, 200
_KEY = re.compile(r"([A-Za-z_]+)\s*:")
_LICENCE_FILE = re.compile(r"(licen[cs]e|copying|notice)([._-].*)?", re.IGNORECASE)


def read_origin(*places: str | Path) -> dict[str, Any]:
    """What the first folder with a model card says, and the licence files beside it.

    Args:
        places: Folders; whatever is none is passed over.

    Returns:
        Lists of texts by field of the card: `license`, `license_name`, `license_link`,
        `base_model`; names by `license_files`. What is not stated is not there.
    """
    folders = [Path(place).expanduser() for place in places]
    for folder in folders:
        if not folder.is_dir():
            continue
        origin: dict[str, Any] = _front_matter(folder / CARD)
        files = [path.name for path in folder.iterdir() if _LICENCE_FILE.fullmatch(path.name)]
        if files:
            origin["license_files"] = sorted(files)[:_MOST_VALUES]
        if origin:
            return origin
    return {}


def _front_matter(card: Path) -> dict[str, Any]:
    if not is_plain_file(card):
        return {}
    try:
        with card.open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf-8", "replace")
    except OSError:
        return {}
    values = {name: _values(lines) for name, lines in _fields(text) if name in _FIELDS}
    return {name: texts for name in _FIELDS if (texts := values.get(name))}


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """The fields of a front matter with the lines that they take."""
    lines = iter(text.removeprefix("\ufeff").split("\n"))
    if next(lines, "").strip() != "---":
        return
    name, taken = "", ""
    for line in lines:
        if line.rstrip() == "---":
            break
        key = _KEY.match(line)
        if key is not None:
            yield name, taken
            name, taken = key.group(1), line
        elif name in _FIELDS and len(taken) < _MOST_OF_A_FIELD:
            taken += "\n" + line
    yield name, taken


def _values(lines: str) -> list[str]:
    """The values of a field: a text or a list of them in YAML."""
    import yaml

    try:
        content = yaml.safe_load(lines[:_MOST_OF_A_FIELD])
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    value = next(iter(content.values()), None) if isinstance(content, dict) else None
    values = value if isinstance(value, list) else [value]
    texts = [str(each) for each in values if isinstance(each, str | int | float)]
    return [text[:_MOST_CHARACTERS] for text in texts if text.strip()][:_MOST_VALUES]
