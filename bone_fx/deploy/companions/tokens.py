"""What tokenizer files say about ids, read without a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bone_fx.deploy.companions.reading import read_object, read_text

_CONFIGS = ("tokenizer_config.json", "special_tokens_map.json")


def special_token(files: Mapping[str, Path], name: str) -> str | None:
    """The text of a special token, such as `eos_token`; None if no file names it.

    Args:
        files: A tokenizer's files by name.
        name: The field.
    """
    for file in _CONFIGS:
        if file in files:
            token = read_object(files[file]).get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                return content
    return None


def token_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """The id of every token that the files list; of an id with two texts both are listed."""
    return dict(_listed(files))


def _listed(files: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    if "vocab.txt" in files:
        lines = read_text(files["vocab.txt"]).split("\n")
        yield from ((line, number) for number, line in enumerate(lines) if line)
    if "vocab.json" in files:
        yield from _numbered(read_object(files["vocab.json"]))
    if "tokenizer.json" in files:
        content = read_object(files["tokenizer.json"])
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, dict):
            yield from _numbered(vocabulary)
        elif isinstance(vocabulary, list):  # unigram: [token, score] by id
            pairs = (entry for entry in enumerate(vocabulary) if isinstance(entry[1], list))
            yield from ((str(entry[0]), number) for number, entry in pairs if entry)
        yield from _added(content.get("added_tokens"))
    if "added_tokens.json" in files:
        yield from _numbered(read_object(files["added_tokens.json"]))
    if "tokenizer_config.json" in files:
        added = read_object(files["tokenizer_config.json"]).get("added_tokens_decoder")
        if isinstance(added, dict):
            entries = [
                {**token, "id": int(number)}
                for number, token in added.items()
                if isinstance(token, dict) and number.isdecimal() and len(number) < 10
            ]
            yield from _added(entries)


def _numbered(vocabulary: dict[str, Any]) -> Iterator[tuple[str, int]]:
    return ((token, number) for token, number in vocabulary.items() if isinstance(number, int))


def _added(entries: object) -> Iterator[tuple[str, int]]:
    for entry in entries if isinstance(entries, list) else ():
        token = entry if isinstance(entry, dict) else {}
        if isinstance(token.get("id"), int) and isinstance(token.get("content"), str):
            yield token["content"], token["id"]
