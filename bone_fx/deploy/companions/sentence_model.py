"""The modules that sentence-transformers runs after a model: pooling, dense layers, norm."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bone_fx.deploy.companions.reading import read_object, read_value
from bone_fx.errors import InputRefusedError, printable

if TYPE_CHECKING:
    from bone_fx.adapter_folder import Adapters

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
        if content.get("include_prompt") is False:
            short += ", without the prompt's tokens"
        return f"{self.kind} ({short})" if short else f"{self.kind} ({self.folder.name})"


def sentence_modules(folder: Path) -> list[SentenceModule]:
    """What stands after the model in a sentence-transformers folder; none elsewhere.

    Raises:
        InputRefusedError: `modules.json` cannot be read.
    """
    path = folder / MODULES
    content = read_value(path)
    if content is None and not path.is_file():
        return []
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputRefusedError(
            f"{path} cannot be read",
            expected="a list of modules, each an object with its type",
            found=str(content)[:200],
            next_step="save the model again with sentence-transformers, or take the file away",
        )
    return [
        SentenceModule(kind, _inside(folder, entry.get("path")))
        for entry in content
        for kind in [str(entry.get("type") or "a module of no type").rpartition(".")[2]]
        if kind != "Transformer"
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


def copy_sentence_files(base: Path, adapters: Adapters, target: Path) -> None:
    """Copy what sentence-transformers runs after a model, of the last folder that has it.

    Args:
        base: The base's folder.
        adapters: The adapters by name, in the order in which they apply.
        target: The folder of the output.

    Raises:
        InputRefusedError: `modules.json` cannot be read.
    """
    folders = [base, *(adapter.path for _, adapter in adapters)]
    source = next((each for each in reversed(folders) if (each / MODULES).is_file()), None)
    if source is None:
        return
    for path in sentence_files(source):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(exist_ok=True, parents=True)
        shutil.copyfile(path, copied)


def sentence_note(folder: Path, *, decodes: bool = False) -> str | None:
    """What an export leaves to the caller; None if nothing stands after the model.

    Args:
        folder: A base's or an adapter's.
        decodes: Whether the graph is a decoder's, which gives logits and no states to pool.
    """
    modules = sentence_modules(folder)
    steps = [module.describe() for module in modules]
    settings = read_object(folder / SETTINGS[0])
    if isinstance(settings.get("max_seq_length"), int):
        steps.append(f"texts cut to {settings['max_seq_length']} tokens")
    if settings.get("do_lower_case"):
        steps.append("texts in lower case")
    more = read_object(folder / SETTINGS[1])
    if more.get("prompts"):
        steps.append(f"the prompts of {SETTINGS[1]}")
    if isinstance(more.get("truncate_dim"), int):
        steps.append(f"embeddings cut to {more['truncate_dim']} values")
    config = read_object(folder / "config.json")
    activation = config.get("sbert_ce_default_activation_function", more.get("activation_fn"))
    if isinstance(config.get("sentence_transformers"), dict):
        activation = config["sentence_transformers"].get("activation_fn", activation)
    if isinstance(activation, str):
        steps.append(f"{activation.rpartition('.')[2]} of the scores")
    if not steps:
        return None
    gives = "the graph gives the model's own outputs, such as last_hidden_state"
    if decodes and modules:
        gives = (
            "the graph gives logits, and no last_hidden_state that could be pooled: for "
            "embeddings, name the model without its head in config.json's architectures"
        )
    return printable(
        f"{gives}; what sentence-transformers does besides, as its files say, is left to the "
        f"caller: {', '.join(steps)}",
        lines=False,
    )
