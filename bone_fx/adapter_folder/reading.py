"""Adapter folders in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

What the tensors of a LoRA or a DoRA are says `lora.contents`. Those of Bone and MiSS have, after
`base_model.model.`, the keys that PEFT 0.18.1 writes and reads:

- `<site>.bone_block` (BONE) or `<site>.miss_block` (MISS);
- `<parameter>` of a module in `modules_to_save`: the trained copy beside the base's own;
- `<parameter>` of another module (embeddings that were resized), and `<site>.base_layer.weight`
  of a targeted one: PEFT writes them into the base itself;
- `<site>.bone_block.<name>`, `<module>.original_module.weight`, `<module>.modules_to_save.weight`:
  other adapters' blocks and second copies, which PEFT ignores when it loads; so do we.

Whatever else a file holds is listed as unused, such as `<site>.weight`: PEFT looks for a site's own
weight under `base_layer`. Folders are untrusted: safetensors only.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bone_fx.adapter_folder.folder import (
    LEAF_OF_TYPE,
    PREFIX,
    WEIGHTS_NAME,
    AdapterFolder,
    TrainedFolder,
)
from bone_fx.adapters import LowRank
from bone_fx.config import CONFIG_NAME, PEFT_TYPES, BoneConfig, read_configuration
from bone_fx.errors import AdapterError, ConfigError, some
from bone_fx.files.inputs import unsafe_entries
from bone_fx.files.nearby import meant
from bone_fx.lora.config import PEFT_TYPE as LORA
from bone_fx.lora.config import LoraConfig
from bone_fx.lora.contents import sorted_contents
from bone_fx.lora.keys import plain, read_key
from bone_fx.lora.refused import next_step_for
from bone_fx.sites import is_trained_whole

_BASE_LAYER = ".base_layer."
_SECOND_COPIES = (".original_module.", ".modules_to_save.")
_BLOCK_KEY = re.compile(r"\.(bone|miss)_block(\.|$)")


def read_adapter(directory: str | Path, name: str = "default") -> AdapterFolder:
    """Read an adapter folder.

    Args:
        directory: The folder, or PEFT's parent of several adapters, of which `name` is taken.
        name: Adapter name, for a parent of several.

    Raises:
        AdapterError: A file is missing, unreadable, not finite, or only pickled.
        ConfigError: A value in `adapter_config.json` is not allowed.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise AdapterError(
            f"there is no adapter folder {directory}", next_step=meant(directory, "check the path")
        )
    if not (folder / CONFIG_NAME).exists() and (folder / name / CONFIG_NAME).exists():
        folder = folder / name
    _refuse_unsafe(folder)
    config = _read_config(folder / CONFIG_NAME)
    tensors = _read_tensors(folder)
    path = folder / WEIGHTS_NAME
    for key, tensor in tensors.items():
        is_part = _BLOCK_KEY.search(key) is not None or read_key(plain(key)) is not None
        if tensor.is_complex() or (is_part and not tensor.is_floating_point()):
            raise AdapterError(
                f"{path}: {key} holds no floats",
                expected="float32",
                found=str(tensor.dtype),
                next_step="save the adapter again, without quantizing it",
            )
    if isinstance(config, LoraConfig):
        adapter = _sorted_lora(folder, config, tensors)
    else:
        adapter = _sorted(folder, config, tensors)
    if not (adapter.blocks or adapter.stacked):
        raise AdapterError(
            f"{path} holds no block",
            expected=f"keys that end in .{LEAF_OF_TYPE[str(config.peft_type)]}",
            found=some(list(tensors)),
            next_step="save the adapter again, or correct peft_type in its configuration",
        )
    for site, tensor in _values(adapter):
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{path}: {site} holds NaN or Inf",
                expected="finite values",
                next_step="train again from a sound state",
            )
    return adapter


def read_trained(directory: str | Path, name: str = "default") -> TrainedFolder:
    """Read an adapter folder of a kind that is trained here; arguments as of `read_adapter`.

    Raises:
        AdapterError: The folder holds no such adapter, or none that is whole.
        ConfigError: A value in `adapter_config.json` is not allowed.
    """
    adapter = read_adapter(directory, name)
    if not isinstance(adapter, TrainedFolder):
        raise AdapterError(
            f"{adapter.path} holds a {adapter.config.peft_type} adapter, which is not trained here",
            expected=f"peft_type {' or '.join(PEFT_TYPES)}",
            found=adapter.config.peft_type,
            next_step="train it with PEFT; `bone-export BASE --adapter DIR -o OUT` exports it, and"
            " `bone-export fold` makes a checkpoint of it",
        )
    return adapter


def _read_config(path: Path) -> BoneConfig | LoraConfig:
    content = read_configuration(path)
    kind = content.get("peft_type")
    if kind == LORA:
        return LoraConfig.from_dict(content, where=str(path))
    if kind not in PEFT_TYPES:
        raise ConfigError(
            f"{path}: peft_type {reprlib.repr(kind)} is none that is read here",
            expected=" or ".join((LORA, *PEFT_TYPES)),
            found=reprlib.repr(kind),
            next_step=next_step_for(kind),
        )
    return BoneConfig.from_dict(content, where=str(path))


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise AdapterError(
            f"no {WEIGHTS_NAME} in {folder}",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            next_step="save the adapter again with safe_serialization=True; pickles are not read",
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{path} is not a readable safetensors file",
            found=str(error),
            next_step="copy or save the adapter again",
        ) from None


def _values(adapter: AdapterFolder) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an adapter, by name of the layer or parameter."""
    for site, block in {**adapter.blocks, **adapter.stacked}.items():
        for tensor in block.tensors() if isinstance(block, LowRank) else (block,):
            yield site, tensor
    yield from adapter.modules_to_save.items()
    yield from adapter.biases.items()
    yield from ((name, rows.values) for name, rows in adapter.rows.items())


def _refuse_unsafe(folder: Path) -> None:
    """Refuse a folder with links that leave it, or with pipes and devices."""
    try:
        unsafe = unsafe_entries(folder)
    except OSError as error:
        raise AdapterError(
            f"{folder} cannot be read",
            found=error.strerror,
            next_step="check the permissions of the folder",
        ) from error
    if unsafe:
        raise AdapterError(
            f"{folder} holds links that leave it, or no regular files",
            expected="files, and links within the folder",
            found=some(unsafe),
            next_step="put the files themselves there, or take the links away",
        )


def adapter_of_tensors(
    config: BoneConfig, tensors: Mapping[str, Tensor], where: str
) -> TrainedFolder:
    """An adapter whose tensors are in memory, under the names that they have in a file.

    Args:
        config: Its configuration.
        tensors: By name.
        where: What a message says they come from.

    Raises:
        AdapterError: Some of them belong to no adapter of this kind.
    """
    adapter = _sorted(Path(where), config, tensors)
    if adapter.unused or not adapter.blocks:
        raise AdapterError(
            f"{where}: not the tensors of a {config.peft_type} adapter",
            expected=f"keys that end in .{LEAF_OF_TYPE[str(config.peft_type)]}",
            found=some(list(adapter.unused or tensors)),
            next_step="take them from get_peft_model_state_dict or from an adapter's file",
        )
    return adapter


def _sorted_lora(folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor]) -> AdapterFolder:
    """The tensors of a LoRA's file by what they are."""
    contents = sorted_contents(config, tensors, folder / WEIGHTS_NAME)
    return AdapterFolder(
        path=folder,
        config=config,
        blocks=contents.blocks,
        modules_to_save=contents.saved,
        in_base=frozenset(contents.in_base),
        unused=tuple(contents.unused),
        biases=contents.biases,
        rows=contents.rows,
        stacked=contents.stacked,
    )


def _sorted(folder: Path, config: BoneConfig, tensors: Mapping[str, Tensor]) -> TrainedFolder:
    """The tensors of a Bone's or MiSS's file by what they are."""
    leaf = f".{LEAF_OF_TYPE[str(config.peft_type)]}"
    blocks: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    in_base: set[str] = set()
    unused: list[str] = []
    names = (key.removeprefix(PREFIX) for key in tensors)
    sites = {name.removesuffix(leaf) for name in names if name.endswith(leaf)}
    for key in sorted(tensors, key=lambda key: (_BASE_LAYER in key, key)):
        name = key.removeprefix(PREFIX)
        parameter = name.replace(_BASE_LAYER, ".")
        if name.endswith(leaf) and name.removesuffix(leaf) not in blocks:
            blocks[name.removesuffix(leaf)] = tensors[key].float()
        elif f"{leaf}." in name or any(part in name for part in _SECOND_COPIES):
            continue
        elif _BLOCK_KEY.search(name) or parameter in saved or name.rpartition(".")[0] in sites:
            unused.append(key)
        else:
            saved[parameter] = tensors[key]
            if not is_trained_whole(config, parameter):
                in_base.add(parameter)
    return TrainedFolder(folder, config, blocks, saved, frozenset(in_base), tuple(unused))
