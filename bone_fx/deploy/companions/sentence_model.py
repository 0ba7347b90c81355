"""The modules that sentence-transformers runs after a model: pooling, dense layers, norm."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from bone_fx.deploy.companions.reading import read_object, read_value
from bone_fx.errors import printable

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
    entries = content if isinstance(content, list) else []
    return [
        SentenceModule(kind, _inside(folder, entry.get("path")))
        for entry in entries
        if isinstance(entry, dict)
        if (kind := str(entry.get("type", "")).rpartition(".")[2]) not in ("Transformer", "")
    ]


def _inside(folder: Path, name: object) -> Path | None:
    """A subfolder by a name from a file of the folder; None if it leads elsewhere."""
    if not isinstance(name, str) or not name or Path(name).is_absolute():
        return None
    path = folder / name
    return path if ".." not in path.parts and path.is_dir() and not path.is_symlink() else None


def sentence_files(folder: Path) -> list[Path]:
    """The files of a sentence-transformers folder that are not the model's, as paths in it."""
    folders = [module.folder for module in sentence_modules(folder) if module.folder is not None]
    beside = [folder / name for name in (MODULES, *SETTINGS)]
    inside = [path for each in folders for path in sorted(each.iterdir())]
    return [path for path in (*beside, *inside) if path.is_file()]


def sentence_note(folder: Path) -> str | None:
    """What an export leaves to the caller; None if nothing stands after the model."""
    steps = [module.describe() for module in sentence_modules(folder)]
    settings = read_object(folder / SETTINGS[0])
    if isinstance(settings.get("max_seq_length"), int):
        steps.append(f"texts cut to {settings['max_seq_length']} tokens")
    if settings.get("do_lower_case"):
        steps.append("texts in lower case")
    if read_object(folder / SETTINGS[1]).get("prompts"):
        steps.append(f"the prompts of {SETTINGS[1]}")
    config = read_object(folder / "config.json")
    activation = config.get("sbert_ce_default_activation_function")
    if isinstance(config.get("sentence_transformers"), dict):
        activation = config["sentence_transformers"].get("activation_fn", activation)
    if isinstance(activation, str):
        steps.append(f"{activation.rpartition('.')[2]} of the scores")
    if not steps:
        return None
    return printable(
        "the graph gives the model's own outputs, such as last_hidden_state; what "
        f"sentence-transformers does besides, as {folder.name} says, is left to the caller: "
        + ", ".join(steps),
        lines=False,
    )
