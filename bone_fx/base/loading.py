"""Opening a base model: a Hugging Face folder, a GGUF file or a hub id.

Nothing here reads a weight. A local folder never touches the network, no pickle is opened, and no
code from a checkpoint runs unless the caller says so.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

from bone_fx.base.weight_files import (
    check_index,
    find_weights,
    read_json,
    read_tensors,
    refuse_unsafe,
)
from bone_fx.errors import BaseModelError, InputRefusedError, UsageError
from bone_fx.files.nearby import meant
from bone_fx.weights.load_plan import LoadPlan
from bone_fx.weights.recipes.recipe import Read
from bone_fx.weights.storage.safetensors_file import file_sha256, same_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

AUTO_CLASSES: dict[str, str] = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The transformers class that each of PEFT's task types stands for."""


@dataclass(frozen=True, eq=False)
class BaseCheckpoint:
    """A base model on disk.

    Attributes:
        origin: What the caller gave: a path or a hub id.
        folder: The folder with config.json and weights; for a GGUF, the dequantized one in the
            cache.
        config: The model's configuration.
        files: Weight files, in order.
        tensors: Every tensor under its name on disk.
        trust_remote_code: Whether the folder's own Python files may be run.
        unread: Tensors and values of a GGUF file that transformers drops, by their names there.
    """

    origin: str
    folder: Path
    config: PreTrainedConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, Read]
    trust_remote_code: bool = False
    unread: tuple[str, ...] = ()
    _hashes: list[Future[str]] = field(default_factory=list, repr=False)

    @property
    def name(self) -> str:
        """The last part of what the caller gave, which messages call the base by."""
        return Path(os.path.abspath(self.origin)).name

    @property
    def architecture(self) -> type[PreTrainedModel]:
        """The class that config.json names, or transformers' plain model for its type.

        Raises:
            BaseModelError: No such class is known.
        """
        from bone_fx.base.architectures import architecture_of

        return architecture_of(self.config, self.folder, trust_remote_code=self.trust_remote_code)

    def start_hashing(self) -> None:
        """Begin to hash the weight files in the background; `sha256` waits for it."""
        if self._hashes:
            return
        self._hashes.extend(Future() for _ in self.files)
        # A daemon: whoever gives up does not wait for the hashes of a large checkpoint.
        Thread(target=self._hash, daemon=True).start()

    def _hash(self) -> None:
        for file, future in zip(self.files, self._hashes, strict=True):
            try:
                future.set_result(file_sha256(file))
            except Exception as error:  # noqa: BLE001 - whoever waits for it gets it
                future.set_exception(error)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of the weight files by their paths in the folder, computed once.

        Raises:
            OSError: A file cannot be read.
        """
        self.start_hashing()
        named = zip(self.files, self._hashes, strict=True)
        return {self.path_of(file): future.result() for file, future in named}

    def path_of(self, file: Path) -> str:
        """Path of a weight file in the folder, as an index names it."""
        return file.relative_to(self.folder).as_posix()

    def plan(self, model: nn.Module) -> LoadPlan:
        """Which tensors on disk make each of a model's, by transformers' own conversions."""
        from bone_fx.base.conversions import plan_loading

        return plan_loading(cast("PreTrainedModel", model), self.tensors)


class Skeleton(NamedTuple):
    """A base model without its weights, and where these are.

    Attributes:
        model: The model in eval mode: parameters fake, computed buffers real.
        plan: How the checkpoint's names become the model's.
    """

    model: PreTrainedModel
    plan: LoadPlan


def open_base(
    base: str | Path,
    *,
    trust_remote_code: bool = False,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> BaseCheckpoint:
    """Find a base model and read its configuration and the headers of its weight files.

    Args:
        base: A folder in Hugging Face layout, a .gguf file, a folder that holds only one, or a hub
            id.
        trust_remote_code: Whether Python files that come with the model may be run.
        cache_dir: Where dequantized GGUF files are kept; `$BONE_FX_CACHE` or `~/.cache/bone_fx` by
            default.
        revision: Branch, tag or commit, for a hub id only.

    Raises:
        BaseModelError: There is no usable model; the message says why.
    """
    path = Path(base).expanduser()
    if path.is_dir() or path.is_file():
        if revision is not None:
            raise UsageError(
                f"{base} is a local model and has no revisions",
                found=f"revision={revision!r}",
                next_step="leave out --revision, or give a hub id",
            )
        folder = path.resolve()
    elif os.path.lexists(path):
        raise BaseModelError(
            f"{base} is no file and no folder",
            expected="a model folder, a .gguf file or a hub id",
            found="a link that leads nowhere, a pipe or a device",
            next_step="give the path of the model itself",
        )
    elif _looks_like_path(str(base)):
        raise BaseModelError(
            f"{base} does not exist",
            expected="a model folder, a .gguf file or a hub id",
            next_step=meant(base, "check the path"),
        )
    else:
        from bone_fx.base.hub import download

        folder = download(str(base), revision, trust_remote_code=trust_remote_code)
    if folder.is_dir():
        refuse_unsafe(folder)
    gguf = _gguf_in(folder)
    dropped: tuple[str, ...] = ()
    if gguf is not None:
        from bone_fx.base.gguf import dequantized_folder, unread

        folder = dequantized_folder(gguf, cache_root(cache_dir))
        dropped = unread(folder)
    raw = _read_config(folder)
    named = raw.get("transformers_weights")
    files = find_weights(folder, named)
    _refuse_quantized(folder, raw)
    tensors = read_tensors(files)
    check_index(folder, named, tensors)
    if not tensors:
        raise BaseModelError(
            f"{folder} holds no weights",
            found=f"no tensor in {', '.join(file.name for file in files)}",
            next_step="download the model again",
        )
    from bone_fx.base.architectures import load_config
    from bone_fx.base.sizes.config_sizes import refuse_impossible_sizes, refuse_kernels

    shapes = [tensor.shape for tensor in tensors.values()]
    stored = sum(tensor.entry.nbytes for tensor in tensors.values())
    refuse_impossible_sizes(folder / "config.json", raw, shapes, stored)
    if not trust_remote_code:
        refuse_kernels(folder / "config.json", raw)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return BaseCheckpoint(str(base), folder, config, files, tensors, trust_remote_code, dropped)


def skeleton(
    base: BaseCheckpoint,
    dtype: torch.dtype,
    *,
    architecture: type[PreTrainedModel] | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    attn_implementation: str | None = None,
    untie: Collection[str] = (),
) -> Skeleton:
    """The model in eval mode without its weights: parameters fake, computed buffers real.

    Args:
        base: The base model.
        dtype: Floating dtype of the parameters.
        architecture: Another class than the checkpoint's own, as an adapter's task may ask for
            (`architecture_for_task`).
        config_overrides: Fields of the configuration to set, such as `num_labels`.
        attn_implementation: Name of the attention function, if not the default.
        untie: Parameters that get a tensor of their own though the model ties them.

    Returns:
        The model, whose parameters are FakeTensors of one FakeTensorMode, and its load plan.

    Raises:
        BaseModelError: The model cannot be built.
    """
    from bone_fx.base.architectures import with_overrides
    from bone_fx.base.sizes.config_sizes import BoundedMemory
    from bone_fx.base.skeleton import complete, meta_model

    def stored_alike(plan: LoadPlan, one: str, other: str) -> bool:
        first, second = plan.sources[one], plan.sources[other]
        if first.convert is not None or second.convert is not None:
            return False
        a, b = base.tensors[first.keys[0]], base.tensors[second.keys[0]]
        return same_bytes(a.path, a.entry, b.path, b.entry)

    config = with_overrides(base.config, config_overrides or {})
    stored = sum(tensor.entry.nbytes for tensor in base.tensors.values())
    with BoundedMemory(stored):
        model = meta_model(config, dtype, architecture or base.architecture, attn_implementation)
    plan = base.plan(model)
    complete(model, dtype, plan, stored_alike, untie)
    return Skeleton(model, plan)


def architecture_for_task(base: BaseCheckpoint, task_type: str | None) -> type[PreTrainedModel]:
    """The class that PEFT's `task_type` means for this model; the checkpoint's own if None.

    Raises:
        InputRefusedError: The task is unknown, or transformers has no such head for this model.
    """
    if task_type is None:
        return base.architecture
    if task_type not in AUTO_CLASSES:
        raise InputRefusedError(
            f"task_type {task_type!r} is not known",
            expected=" or ".join(AUTO_CLASSES),
            found=task_type,
            next_step="correct task_type in adapter_config.json",
        )
    from bone_fx.base.architectures import auto_architecture

    return auto_architecture(base.config, AUTO_CLASSES[task_type])


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Where converted models are kept."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("BONE_FX_CACHE") or "~/.cache/bone_fx").expanduser()


def _looks_like_path(base: str) -> bool:
    return base.startswith((".", "/", "~")) or base.count("/") > 1 or base.endswith((".gguf", "/"))


def _gguf_in(path: Path) -> Path | None:
    """The GGUF file to dequantize, if the base is one or holds nothing else."""
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise BaseModelError(
            f"{path} is no model",
            expected="a folder or a .gguf file",
            found=f"a {path.suffix} file",
            next_step="give the folder, not a file in it",
        )
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise BaseModelError(
            f"{path} holds several GGUF files",
            found=", ".join(file.name for file in files[:5]),
            next_step="give the path of one of them",
        )
    return files[0] if files else None


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            find_weights(folder)
        raise BaseModelError(
            f"{folder} has no config.json",
            expected="a model folder in Hugging Face layout",
            found=", ".join(sorted(entry.name for entry in folder.iterdir())[:10])
            or "an empty folder",
            next_step="download the complete model",
        )
    return read_json(path)


def _refuse_quantized(folder: Path, raw: Mapping[str, object]) -> None:
    parts = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    for part in parts:
        quantization = part.get("quantization_config") or part.get("compression_config")
        if quantization:
            method = (
                quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            )
            raise BaseModelError(
                f"{folder} is quantized, and blocks cannot be folded into quantized weights",
                expected="weights in float32, float16 or bfloat16",
                found=f"quantization_config with quant_method {method!r}",
                next_step="use the unquantized model, or dequantize it first",
            )
