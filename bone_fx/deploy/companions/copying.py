"""Copying what stands beside the weights into an output folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.deploy.companions.chat_templates import (
    DEFAULT,
    TEMPLATE_FILE,
    read_templates,
    template_files,
    write_templates,
)
from bone_fx.deploy.companions.choice import GENERATION_FILE, VOCABULARIES, Companions
from bone_fx.deploy.companions.reading import read_object, write_object
from bone_fx.errors import printable

if TYPE_CHECKING:
    from bone_fx.base.loading import BaseCheckpoint


def copy_companions(companions: Companions, folder: Path) -> None:
    """Copy tokenizer, chat templates and processors; the files keep their form."""
    for name, path in {**companions.tokenizer, **companions.processors}.items():
        shutil.copyfile(path, folder / name)
    source = companions.templates_of
    if source is not None:
        for name in template_files(source):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    config = companions.tokenizer.get("tokenizer_config.json")
    mixed = source is not None and config is not None and config.parent != source
    if mixed or read_templates(folder) != companions.templates:
        write_templates(companions.templates, folder)


def copy_for_genai(companions: Companions, checkpoint: BaseCheckpoint, folder: Path) -> list[str]:
    """Copy the same in the form that onnxruntime-genai reads; returns what it cannot use.

    It reads `tokenizer.json`, and a chat template that is one text.
    """
    copy_companions(companions, folder)
    notes = _make_tokenizer_json(companions, checkpoint, folder)
    if set(read_templates(folder)) - {DEFAULT} or not _is_plain(folder):
        write_templates(companions.templates, folder)
    if not (folder / "tokenizer.json").is_file():
        return notes
    if DEFAULT not in companions.templates:
        others = ", ".join(companions.templates)
        source = companions.adapter or printable(checkpoint.name, lines=False)
        notes.append(
            f"{source} has no chat template"
            f"{f' called default, only {others}' if others else ''}: prompts are passed as they are"
        )
    return notes


def _is_plain(folder: Path) -> bool:
    """Whether the default template stands where onnxruntime-genai looks for it."""
    field = read_object(folder / "tokenizer_config.json").get("chat_template")
    if (folder / TEMPLATE_FILE).is_file():
        return field in (None, read_templates(folder)[DEFAULT])
    return isinstance(field, str) or not read_templates(folder)


def _make_tokenizer_json(
    companions: Companions, checkpoint: BaseCheckpoint, folder: Path
) -> list[str]:
    """Convert a tokenizer without `tokenizer.json`; returns what a person should know of it."""
    if "tokenizer.json" in companions.tokenizer:
        return []
    vocabulary = next((name for name in VOCABULARIES if name in companions.tokenizer), None)
    if vocabulary is None:
        name = printable(checkpoint.name, lines=False)
        return [f"{name} has no tokenizer.json: onnxruntime-genai gets token ids only"]
    from bone_fx.base.tokenizer import TokenizerError, write_tokenizer_json

    path = companions.tokenizer[vocabulary]
    trusted = checkpoint.trust_remote_code
    try:
        write_tokenizer_json(path, checkpoint.config, folder, trust_remote_code=trusted)
    except TokenizerError as error:
        source = checkpoint.name if path.parent == companions.base else path.parent.name
        return [
            (
                f"{printable(source, lines=False)} has {vocabulary} and no tokenizer.json, which "
                f"onnxruntime-genai needs to read texts, and it was not converted: {error}"
            )
        ]
    return [f"tokenizer.json: converted from {vocabulary}, which onnxruntime-genai does not read"]


def write_generation_settings(
    settings: Mapping[str, Any], changed: Mapping[str, int], folder: Path
) -> None:
    """Write generation settings into a checkpoint's folder, and changed token ids into its config.

    Args:
        settings: The content of generation_config.json.
        changed: Token ids that an adapter's tokenizer changes.
        folder: A folder with config.json.
    """
    if not changed:
        return
    if (folder / GENERATION_FILE).is_file():
        write_object(folder / GENERATION_FILE, dict(settings))
    config = read_object(folder / "config.json")
    config.update(changed)
    text = config.get("text_config")
    if isinstance(text, dict):
        text.update({key: token for key, token in changed.items() if key in text})
    write_object(folder / "config.json", config)
