"""GGUF files: dequantized by transformers, once, into a safetensors folder in the cache.

A file that lacks a tensor of its model is refused: transformers would fill it with random values.
Tensors and values that transformers does not read are listed in the folder for `unread`. The folder
is keyed by the file's SHA-256, written under another name and moved into place when it is complete.
"""

from __future__ import annotations

import json
import logging
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from bone_fx.base.left_over import without_adapter
from bone_fx.base.sizes.config_sizes import refuse_impossible_gguf
from bone_fx.base.sizes.gguf_header import read_head
from bone_fx.base.sizes.gguf_values import lacks_epsilon, unread_values
from bone_fx.base.tokenizer import cannot_be_read
from bone_fx.errors import BaseModelError, some
from bone_fx.files.renames import rename_new
from bone_fx.files.work_folder import dead_work_folders, make_work_folder
from bone_fx.weights.storage.safetensors_file import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LAYOUT = "gguf3"
"""Part of the key: changed when the folder's content would be another for the same file."""
_UNREAD = "unread.json"
"""In the folder: names in the GGUF file of the tensors and values that transformers drops."""
_TAKEN_APART = re.compile(r"^(enc\.|dec\.)?blk\.\d+\..*(_exps|_shexp|ssm_|shortconv|time_mix_)")
"""Tensors of experts and of state spaces, which transformers takes apart by itself."""
_ROPE_FACTORS = "rope_freqs.weight"
_log = logging.getLogger(__name__)
_READ_ERRORS = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    OSError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    struct.error,
)


def dequantized_folder(file: Path, cache: Path) -> Path:
    """A Hugging Face folder with a GGUF file's weights in float32, configuration and tokenizer.

    Raises:
        BaseModelError: The file is no GGUF, or of a kind that transformers cannot dequantize, or
            the `gguf` package is missing.
    """
    _check_magic(file)
    folder = cache / f"{LAYOUT}-{file_sha256(file)}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for dead in dead_work_folders(cache, folder.name):
            dead.remove()
        work = make_work_folder(cache, folder.name)
        staging = work.path / "model"
        staging.mkdir()
    except OSError as error:
        raise BaseModelError(
            f"{cache} cannot hold the dequantized model",
            found=error.strerror or str(error),
            next_step="set BONE_FX_CACHE to a folder that can be written",
        ) from error
    try:
        refuse_impossible_gguf(file)
        _dequantize(file, staging)
        with suppress(FileExistsError):  # another process was first, with the same bytes
            rename_new(staging, folder)
    finally:
        work.remove()
    return folder


def unread(folder: Path) -> tuple[str, ...]:
    """What a dequantized folder lists as not read by transformers, by the names in the GGUF."""
    path = folder / _UNREAD
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ()


def _dequantize(file: Path, target: Path) -> None:
    try:
        import gguf  # noqa: F401 - transformers needs it, and says so less clearly
    except ImportError as error:
        raise BaseModelError(
            f"reading {file.name} needs the package gguf", next_step="pip install gguf"
        ) from error
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GgufConfig

    source: dict[str, str] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(**source, local_files_only=True)
            auto = (
                AutoModelForCausalLM
                if type(config) in AutoModelForCausalLM._model_mapping
                else AutoModel
            )
            with without_adapter(file.parent) as folder:
                model, report = cast(Any, auto).from_pretrained(
                    **{**source, "pretrained_model_name_or_path": str(folder)},
                    output_loading_info=True,
                    config=config,
                    local_files_only=True,
                    dtype=torch.float32,
                    quantization_config=GgufConfig(dequantize=True),
                )
        except _READ_ERRORS as error:
            raise BaseModelError(
                f"{file} cannot be dequantized",
                found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
                next_step="use the model's safetensors checkpoint",
            ) from error
        _check_complete(file, report)
        dropped = [*_unread_tensors(file, model), *_unread_values(file, model)]
        for owner, mark in ((model, "hf_quantizer"), (model.config, "quantization_config")):
            vars(owner).pop(mark, None)  # what would keep a plain model from being saved as one
        model.save_pretrained(target)
        if dropped:
            (target / _UNREAD).write_text(json.dumps(dropped), encoding="utf-8")
        _save_tokenizer(source, target)


def _check_complete(file: Path, report: Mapping[str, Collection[object]]) -> None:
    """Refuse a file from which transformers did not get every weight.

    Raises:
        BaseModelError: A weight is missing or of another shape.
    """
    for kind in ("missing_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report.get(kind, ()))
        if names:
            raise BaseModelError(
                f"{file} does not hold the whole model: {names[0]} would be random",
                expected="a tensor for every weight that its metadata describe",
                found=f"{kind.replace('_', ' ')}: {some(names, 3)}",
                next_step="download it again, or use the model's safetensors checkpoint",
            )


def _unread_tensors(file: Path, model: PreTrainedModel) -> list[str]:
    """Names of the tensors that change the model's outputs and transformers has no use for."""
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as reading

    kind = reading.TENSOR_PROCESSORS.get(model.config.model_type, reading.TensorProcessor)
    processor = cast(Any, kind)(config=model.config.to_dict())
    read = reading.get_gguf_hf_weights_map(model, processor)
    return [
        tensor.name
        for tensor in GGUFReader(file).tensors
        if tensor.name not in read
        and not _TAKEN_APART.search(tensor.name)
        and not (tensor.name == _ROPE_FACTORS and bool((tensor.data == 1).all()))
    ]


def _unread_values(file: Path, model: PreTrainedModel) -> list[str]:
    """Names of the values that change the model's outputs and transformers has no use for.

    Raises:
        BaseModelError: A value that no default stands for is missing.
    """
    values = read_head(file).values
    if lacks_epsilon(values):
        raise BaseModelError(
            f"{file} does not say what its norms add to a variance",
            expected="a value whose name ends in layer_norm_rms_epsilon or layer_norm_epsilon",
            found="none",
            next_step="download it again, or use the model's safetensors checkpoint",
        )
    return unread_values(values, model.config.to_dict())


def _save_tokenizer(source: dict[str, str], target: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(**source, local_files_only=True).save_pretrained(target)
    except BaseException as error:
        if not cannot_be_read(error):
            raise
        _log.warning("%s has no tokenizer that can be read: %s", source["gguf_file"], error)


def _check_magic(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            magic = stream.read(4)
    except OSError as error:
        raise BaseModelError(
            f"{file} cannot be read",
            found=error.strerror or str(error),
            next_step="make it readable",
        ) from error
    if magic != b"GGUF":
        raise BaseModelError(
            f"{file} is not a GGUF file",
            expected=b"GGUF",
            found=magic,
            next_step="download it again",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and load reports off the screen; one of the bars asks no setting."""
    from transformers.utils import logging as transformers_logging

    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
