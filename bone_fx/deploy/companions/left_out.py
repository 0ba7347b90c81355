"""What stands in the input folders, changes what a model does elsewhere, and is not used here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bone_fx.base.left_over import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from bone_fx.deploy.companions.choice import adapter_label
from bone_fx.deploy.companions.reading import read_object
from bone_fx.deploy.companions.sentence_model import sentence_note
from bone_fx.errors import printable, some

if TYPE_CHECKING:
    from bone_fx.adapter_folder import Adapters
    from bone_fx.base.loading import BaseCheckpoint

_QUANTIZATION = ("quantize_config.json", "quant_config.json")
_IGNORED_FIELDS = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "eos_token_id", "bos_token_id", "pad_token_id", "vocab_size"),
    *("num_labels", "id2label", "label2id", "problem_type"),
}
"""Fields of a configuration that change nothing in a graph, or that other files decide."""


def files_left_out(checkpoint: BaseCheckpoint, adapters: Adapters) -> list[str]:
    """Notes on files of the base and of the adapters that are not used.

    Raises:
        InputRefusedError: A file cannot be read.
    """
    base = checkpoint.folder
    notes = [
        *_left_over_adapter(base, checkpoint.name),
        *_code(base, checkpoint.name, trusted=checkpoint.trust_remote_code),
        *_quantization(base, checkpoint.name),
    ]
    for name, adapter in adapters:
        notes += _code(adapter.path, adapter.path.name, trusted=False)
        notes += _other_config(base, adapter.path, adapter_label(name, adapter))
    return [printable(note, lines=False) for note in notes]


def sentence_notes(base: Path, adapters: Adapters, *, decodes: bool = False) -> list[str]:
    """A note on pooling, dense layers and norm, of the last folder that has any."""
    folders = [base, *(adapter.path for _, adapter in adapters)]
    found = (sentence_note(folder, decodes=decodes) for folder in folders)
    notes = [note for note in found if note is not None]
    return notes[-1:]


def _left_over_adapter(folder: Path, label: str) -> list[str]:
    names = [name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS) if (folder / name).is_file()]
    if not names:
        return []
    return [
        (
            f"{label} holds an adapter beside its weights ({', '.join(names)}), which is not "
            f"applied: if its weights are not merged, pass --adapter {label}"
        )
    ]


def _code(folder: Path, label: str, *, trusted: bool) -> list[str]:
    names = sorted(path.name for path in folder.glob("*.py"))
    names += sorted(
        f"{path.parent.name}/{path.name}" for path in folder.glob("custom_generate/*.py")
    )
    if trusted or not names:
        return []
    return [
        (
            f"{label} brings code that was neither run nor copied: {some(names)}; "
            "read it, and pass --trust-remote-code if the model needs it"
        )
    ]


def _quantization(folder: Path, label: str) -> list[str]:
    return [
        f"{label} holds {name}, which is not read: the weights are taken as they are stored"
        for name in _QUANTIZATION
        if (folder / name).is_file()
    ]


def _other_config(base: Path, adapter: Path, name: str) -> list[str]:
    """An adapter's own config.json that describes another model than the base's does."""
    brought = read_object(adapter / "config.json")
    stored = read_object(base / "config.json")
    fields = [
        key
        for key in brought
        if key not in _IGNORED_FIELDS and key in stored and brought[key] != stored[key]
    ]
    if not fields:
        return []
    return [
        (
            f"config.json of adapter {name} is not used, and differs from the "
            f"base's in {', '.join(fields[:5])}: PEFT does not read it either"
        )
    ]
