"""The modules that sentence-transformers runs after a model: pooling, dense layers, norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from bone_fx.deploy.companions.reading import read_object, read_value

MODULES = "modules.json"
SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json")


class SentenceModule(NamedTuple):
    """A module of `modules.json` that is not the model itself.

    Attributes:
        kind: Its class, such as `Pooling`.
        folder: Its folder; None if it has none.
    """

    kind: str
    folder: Path | None

    def describe(self) -> str:
        """What it is, for a person."""
        if self.folder is None:
            return self.kind
        content = read_object(self.folder / "config.json")
        modes = [key for key, value in content.items() if value is True and "mode" in key]
        if isinstance(content.get("pooling_mode"), str):
            modes.append(content["pooling_mode"])
        short = ", ".join(mode.removeprefix("pooling_mode_") for mode in modes)
        return f"{self.kind} ({short})" if short else f"{self.kind} ({self.folder.name})"


def sentence_modules(folder: Path) -> list[SentenceModule]:
    """What stands after the model in a sentence-transformers folder; none elsewhere.

    Raises:
        InputRefusedError: `modules.json` cannot be read.
    """
    content = read_value(folder / MODULES)
    entries = [entry for entry in content if isinstance(entry, dict)] if _is_list(content) else []
    return [
        SentenceModule(kind, _inside(folder, entry.get("path")))
        for entry in entries
        if (kind := str(entry.get("type", "")).rpartition(".")[2]) not in ("Transformer", "")
    ]


def _inside(folder: Path, name: object) -> Path | None:
    """A subfolder by a name from a file of the folder; None if it leads elsewhere."""
    if not isinstance(name, str) or not name or Path(name).is_absolute():
        return None
    path = folder / name
    return path if ".." not in path.parts and path.is_dir() and not path.is_symlink() else None


def _is_list(content: Any) -> bool:
    return isinstance(content, list)


def sentence_files(folder: Path) -> list[Path]:
    """The files of a sentence-transformers folder that are not the model's, as paths in it."""
    folders = [module.folder for module in sentence_modules(folder) if module.folder is not None]
    beside = [folder / name for name in (MODULES, *SETTINGS)]
    inside = [path for each in folders for path in sorted(each.iterdir())]
    return [path for path in (*beside, *inside) if path.is_file()]


def sentence_note(folder: Path) -> str | None:
    """What an export leaves to the caller; None if nothing stands after the model."""
    modules = sentence_modules(folder)
    if not modules:
        return None
    length = read_object(folder / SETTINGS[0]).get("max_seq_length")
    shortened = f" Texts are cut to {length} tokens there." if isinstance(length, int) else ""
    return (
        f"the graph gives the model's own outputs, such as last_hidden_state; what {MODULES} of "
        f"{folder.name} puts after them is left to the caller: "
        f"{', '.join(module.describe() for module in modules)}.{shortened}"
    )
