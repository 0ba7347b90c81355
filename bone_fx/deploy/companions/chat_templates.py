"""Chat templates in the four places where checkpoints of the last years keep them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from bone_fx.deploy.companions.reading import read_object, read_text, write_object
from bone_fx.errors import InputRefusedError

DEFAULT = "default"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
PROCESSOR_TEMPLATE = "chat_template.json"
FIELD = "chat_template"
"""The field of tokenizer_config.json: a template, or a list of named ones."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def template_files(folder: Path) -> list[str]:
    """Names of the files in a folder that hold nothing but chat templates."""
    more = sorted(path.name for path in (folder / MORE_TEMPLATES).glob("*.jinja"))
    named = [f"{MORE_TEMPLATES}/{name}" for name in more if _NAME.fullmatch(name)]
    names = [TEMPLATE_FILE, PROCESSOR_TEMPLATE, *named]
    return [name for name in names if (folder / name).is_file()]


def read_templates(folder: Path) -> dict[str, str]:
    """A folder's chat templates by name, as transformers reads them; `default` is the plain one.

    Raises:
        InputRefusedError: A file cannot be read, or a template is no text.
    """
    names = [name for name in template_files(folder) if name != PROCESSOR_TEMPLATE]
    if names:
        return {
            DEFAULT if name == TEMPLATE_FILE else Path(name).stem: read_text(folder / name)
            for name in names
        }
    config = folder / "tokenizer_config.json"
    for path in (config, folder / PROCESSOR_TEMPLATE):
        templates = _named(read_object(path).get(FIELD), path)
        if templates:
            return templates
    return {}


def _named(value: object, path: Path) -> dict[str, str]:
    """The templates of a field: a text, a list of `{"name", "template"}`, or a text by name."""
    pairs: list[tuple[object, object]] = []
    if isinstance(value, str):
        pairs = [(DEFAULT, value)]
    elif isinstance(value, dict):
        pairs = list(value.items())
    elif isinstance(value, list):
        pairs = [
            (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, entry)
            for entry in value
        ]
    elif value is not None:
        pairs = [(None, value)]
    templates = {
        name: template
        for name, template in pairs
        if isinstance(name, str) and isinstance(template, str) and _NAME.fullmatch(name)
    }
    if len(templates) != len(pairs):
        raise InputRefusedError(
            f"{FIELD} in {path} cannot be read",
            expected="a template, or a list of named templates with names of their own",
            found=str(value)[:200],
            next_step="save the tokenizer again with transformers",
        )
    return templates


def write_templates(templates: Mapping[str, str], folder: Path) -> None:
    """Write templates as files of their own; tokenizer_config.json in the folder loses its field.

    So one template is one file for transformers and for onnxruntime-genai, which refuses lists.
    """
    for name, template in templates.items():
        path = folder / (TEMPLATE_FILE if name == DEFAULT else f"{MORE_TEMPLATES}/{name}.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    content = read_object(config)
    if FIELD in content:
        del content[FIELD]
        write_object(config, content)
