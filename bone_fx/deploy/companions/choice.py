"""Which folder each file beside the weights comes from: the base's, or an adapter's.

Trainers save tokenizer, chat template and generation settings beside an adapter, because the
adapter was trained with them: they have precedence over the base's, and the last adapter's over
the others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.deploy.companions.chat_templates import read_templates, template_files
from bone_fx.deploy.companions.reading import read_object
from bone_fx.deploy.companions.tokens import special_token, token_ids
from bone_fx.errors import AdapterError, InputRefusedError, printable
from bone_fx.weights.storage.safetensors_file import file_sha256

if TYPE_CHECKING:
    from bone_fx.adapter_folder import AdapterFolder, Adapters

VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("vocab.json", "vocab.txt", "source.spm", "target.spm", "tekken.json"),
    *("tiktoken.model", "qwen.tiktoken"),
)
"""Files of which one makes a tokenizer."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    *("merges.txt", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"),
)
PROCESSOR_FILES = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extractor_config.json"),
)
GENERATION_FILE = "generation_config.json"
_MOST_TOKENS = 1 << 31
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class Companions:
    """The files that go beside a model's weights.

    Attributes:
        base: The base's folder.
        tokenizer: Files of the tokenizer by name.
        processors: Files of image, audio and text processors by name.
        generation: `generation_config.json`; None if nobody brings one.
        templates: Chat templates by name.
        templates_of: The folder whose chat templates these are; None if there are none.
        adapter: Name of the adapter that brings the tokenizer; None if it is the base's.
        notes: What comes from an adapter.
    """

    base: Path
    tokenizer: Mapping[str, Path] = field(default_factory=dict)
    processors: Mapping[str, Path] = field(default_factory=dict)
    generation: Path | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    templates_of: Path | None = None
    adapter: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def tokenizer_folder(self) -> Path:
        """The folder that the tokenizer is read from."""
        paths = [path for name, path in self.tokenizer.items() if name in VOCABULARIES]
        return paths[-1].parent if paths else self.base

    def check_vocabulary(self, model: Any) -> None:
        """Refuse an adapter's tokenizer with more tokens than a model's embedding has rows for.

        Args:
            model: The transformers model, with the adapters' own embeddings if they bring them.

        Raises:
            AdapterError: It has.
        """
        if self.adapter is None:
            return
        rows = model.get_input_embeddings().weight.shape[0]
        beyond = {token: n for token, n in token_ids(self.tokenizer).items() if n >= rows}
        if beyond:
            first = min(beyond, key=lambda token: beyond[token])
            raise AdapterError(
                f"the tokenizer of adapter {self.adapter} has tokens that the model has not",
                expected=f"ids below {rows}, the rows of the embedding",
                found=f"{len(beyond)} tokens beyond, the first {first!r} with id {beyond[first]}",
                next_step="save the resized embeddings with the adapter (PEFT's "
                "save_embedding_layers=True), or remove the tokenizer from the adapter's folder",
            )

    def token_notes(self, changed: Mapping[str, int]) -> list[str]:
        """A note on token ids that an adapter's tokenizer changes."""
        named = ", ".join(f"{key} is {token}" for key, token in changed.items())
        return [f"{named}: from the tokenizer of adapter {self.adapter}"] if changed else []

    def generation_settings(self, config: Any) -> tuple[dict[str, Any], dict[str, int]]:
        """The content of generation_config.json, and the token ids that an adapter changes.

        Where the tokenizer is an adapter's, and it ends, begins or pads texts with another token
        than the base's does, that token's id replaces the configured one, unless the adapter brings
        a generation_config.json that says otherwise.

        Args:
            config: The model's configuration.

        Raises:
            InputRefusedError: A file cannot be read.
        """
        settings = {} if self.generation is None else read_object(self.generation)
        changed: dict[str, int] = {}
        if self.adapter is None:
            return settings, changed
        before = _named_files(self.base, TOKENIZER_FILES)
        is_the_adapters = self.generation is not None and self.generation.parent != self.base
        ids: Mapping[str, int] | None = None
        for name in SPECIAL_TOKENS:
            token = special_token(self.tokenizer, name)
            key = f"{name}_id"
            if token is None or token == special_token(before, name):
                continue
            if is_the_adapters and settings.get(key) is not None:
                continue
            ids = token_ids(self.tokenizer) if ids is None else ids
            if token in ids and ids[token] not in _as_list(configured_token(settings, config, key)):
                changed[key] = ids[token]
        return {**settings, **changed}, changed


def companion_files(folder: Path) -> list[Path]:
    """The files beside the weights in a folder, of those that an output may get."""
    names = (*TOKENIZER_FILES, *PROCESSOR_FILES, GENERATION_FILE)
    return [*_named_files(folder, names).values(), *(folder / n for n in template_files(folder))]


def hashes_beside_weights(folder: Path) -> dict[str, str]:
    """SHA-256 of a folder's configuration and companions, by name."""
    paths = [path for path in (folder / "config.json", *companion_files(folder)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}


def choose_companions(base: Path, adapters: Adapters = ()) -> Companions:
    """Choose the files that go beside a model's weights.

    Args:
        base: The base's folder.
        adapters: The adapters by name, in the order in which they apply.

    Raises:
        InputRefusedError: A chat template cannot be read.
    """
    generation = base / GENERATION_FILE
    templates = read_templates(base)
    chosen = Companions(
        base=base,
        tokenizer=_named_files(base, TOKENIZER_FILES),
        processors=_named_files(base, PROCESSOR_FILES),
        generation=generation if generation.is_file() else None,
        templates=templates,
        templates_of=base if templates else None,
    )
    origins: dict[str, str] = {}
    for name, adapter in adapters:
        chosen = _with_adapter(chosen, adapter.path, adapter_label(name, adapter), origins)
    notes = [f"{what}: from adapter {name}" for what, name in origins.items()]
    if chosen.adapter is not None and "chat template" not in origins and templates:
        notes.append(f"chat template: the base's, as adapter {chosen.adapter} brings none")
    return replace(chosen, notes=tuple(notes))


def adapter_label(name: str, adapter: AdapterFolder) -> str:
    """How an adapter is called in notes: its name, or its folder's where it is the only one."""
    return printable(adapter.path.resolve().name if name == "default" else name, lines=False)


def _with_adapter(
    chosen: Companions, folder: Path, name: str, origins: dict[str, str]
) -> Companions:
    """The choice with what an adapter's folder brings; `origins` gets the adapter's name for it."""
    tokenizer = _named_files(folder, TOKENIZER_FILES)
    if any(file in tokenizer for file in VOCABULARIES):
        if _is_older_form(tokenizer, chosen.tokenizer):
            tokenizer["tokenizer.json"] = chosen.tokenizer["tokenizer.json"]
        chosen = replace(chosen, tokenizer=tokenizer, adapter=name)
        origins["tokenizer"] = name
    elif tokenizer and chosen.tokenizer:
        chosen = replace(chosen, tokenizer={**chosen.tokenizer, **tokenizer}, adapter=name)
        origins["tokenizer settings"] = name
    templates = read_templates(folder)
    if templates:
        chosen = replace(chosen, templates=templates, templates_of=folder)
        origins["chat template"] = name
    processors = _named_files(folder, PROCESSOR_FILES)
    if processors:
        chosen = replace(chosen, processors={**chosen.processors, **processors})
        origins.update(dict.fromkeys(processors, name))
    if (folder / GENERATION_FILE).is_file():
        chosen = replace(chosen, generation=folder / GENERATION_FILE)
        origins[GENERATION_FILE] = name
    return chosen


def _is_older_form(tokenizer: Mapping[str, Path], earlier: Mapping[str, Path]) -> bool:
    """Whether a tokenizer without `tokenizer.json` is an earlier one that has it, as before."""
    if "tokenizer.json" in tokenizer or "tokenizer.json" not in earlier:
        return False
    vocabularies = [name for name in VOCABULARIES if name in tokenizer]
    if any(name not in earlier for name in vocabularies):
        return False
    same = all(file_sha256(tokenizer[n]) == file_sha256(earlier[n]) for n in vocabularies)
    return same and token_ids(tokenizer).items() <= token_ids(earlier).items()


def configured_token(settings: Mapping[str, Any], config: Any, key: str) -> int | list[int] | None:
    """A special token's id, or several: the generation settings', else the configuration's.

    Raises:
        InputRefusedError: It is no id.
    """
    token = settings.get(key)
    if token is None:
        token = getattr(config.get_text_config(), key, None)
    numbers = _as_list(token)
    if any(type(number) is not int or abs(number) >= _MOST_TOKENS for number in numbers):
        raise InputRefusedError(
            f"{key} of the base or of an adapter is no token",
            expected="a whole number or a list of them, in generation_config.json or config.json",
            found=repr(token)[:80],
            next_step="correct it there",
        )
    return numbers[0] if len(numbers) == 1 else numbers or None


def _as_list(token: Any) -> list[Any]:
    if token is None:
        return []
    return token if isinstance(token, list) else [token]


def _named_files(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}
