"""The model card beside a saved adapter: what the hub asks of it, and a text for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import nn

import bone_fx
from bone_fx.capture.trace.hf_model import is_transformers_model
from bone_fx.config import BoneConfig

CARD_NAME = "README.md"
_VERSIONS = "### Framework versions"
_TEXT = """
# {kind} adapter{of_base}

`{name}`: {method}, r = {r}, on {targets}.

```python
import bone_fx
from transformers import {model_class}

model = {model_class}.from_pretrained("{base}")
adapted = bone_fx.AdaptedModule.from_pretrained(model, "path/to/this/folder")
```
"""


def write_model_card(
    folder: Path, model: nn.Module | None, adapters: Iterable[tuple[str, BoneConfig]]
) -> None:
    """Write or update a model card as PEFT 0.18.1 does; a person's own text stays.

    Args:
        folder: Where `README.md` goes.
        model: The base model.
        adapters: The saved adapters by name.

    Raises:
        ValueError: There is a `README.md` whose head is not YAML.
    """
    named = list(adapters)
    path = folder / CARD_NAME
    base = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    card = ModelCard.load(path) if path.exists() else _new_card(model, named, base)
    data: Any = card.data
    data.library_name = "peft"  # which the hub knows; the files are PEFT's
    tags = set(getattr(model, "model_tags", None) or ()) | set(data.get("tags") or ())
    if model is not None and is_transformers_model(model):
        tags.add("transformers")
    if base:
        tags.add(f"base_model:adapter:{base}")
        data.base_model = base
    if tags:
        data.tags = sorted(tags)
    causal = any(config.task_type == "CAUSAL_LM" for _, config in named)
    if causal and not data.get("pipeline_tag"):
        data.pipeline_tag = "text-generation"
    version = f"- bone_fx {bone_fx.__version__}"
    lines = card.text.splitlines()
    if version not in lines:
        if _VERSIONS in lines:
            lines.insert(lines.index(_VERSIONS) + 2, version)
        else:
            lines += ["", _VERSIONS, "", version]
    card.text = "\n".join(lines) + "\n"
    card.save(path)


def _new_card(
    model: nn.Module | None, adapters: list[tuple[str, BoneConfig]], base: str
) -> ModelCard:
    name, config = adapters[0]
    targets = config.target_modules
    text = _TEXT.format(
        name=name,
        kind={"BONE": "Bone", "MISS": "MiSS"}[str(config.peft_type)],
        of_base=f" for {base}" if base else "",
        method={"bone": "Bone", "bat": "BAT", "mini": "MiSS mini"}[config.method],
        r=config.r,
        targets=targets if isinstance(targets, str) else ", ".join(targets or ()),
        model_class=type(model).__name__,
        base=base or "path/to/the/base",
    )
    return ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n{text}", ignore_metadata_errors=True)
