"""Adapter folders in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

Keys, after `base_model.model.`, as PEFT 0.18.1 writes and reads them:

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

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bone_fx.adapters import METHODS
from bone_fx.config import CONFIG_NAME, BoneConfig
from bone_fx.errors import AdapterError, UsageError, some
from bone_fx.files.inputs import unsafe_entries
from bone_fx.files.nearby import meant
from bone_fx.sites import LinearSite, Refusal, check_fit, is_trained_whole, select_sites

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
_SECOND_COPIES = (".original_module.", ".modules_to_save.")
_BLOCK_KEY = re.compile(r"\.(bone|miss)_block(\.|$)")
_BLOCK_OF_TYPE = {"BONE": "bone_block", "MISS": "miss_block"}


@dataclass(frozen=True)
class AdapterFolder:
    """A trained adapter as it was read.

    Attributes:
        path: The folder.
        config: Its configuration.
        blocks: Block by site name, float32 as PEFT loads it (`autocast_adapter_dtype`).
        modules_to_save: Tensor by parameter name of every parameter that the file brings besides.
        in_base: Those of them that PEFT writes into the base itself, whatever else is tied to it.
        unused: Keys of tensors that mean nothing for this kind of adapter.
        given_up: Names and keys of tensors that the person gave up.
    """

    path: Path
    config: BoneConfig
    blocks: dict[str, Tensor]
    modules_to_save: dict[str, Tensor]
    in_base: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()

    def match(
        self,
        sites: Iterable[LinearSite],
        others: Iterable[Refusal] = (),
        output_layers: Iterable[str] = (),
    ) -> list[LinearSite]:
        """The sites of a model that this adapter adapts, each with a block that fits.

        Raises:
            SiteError: The configuration matches nothing, or a method cannot fit a layer.
            AdapterError: Blocks and matched layers differ, or a shape does; the message lists both
                sides.
        """
        chosen, _ = select_sites(self.config, sites, others, set(output_layers))
        for site in chosen:
            check_fit(self.config, site)
        names = {site.name for site in chosen}
        missing = [site.name for site in chosen if site.name not in self.blocks]
        foreign = [name for name in self.blocks if name not in names]
        if missing or foreign:
            raise AdapterError(
                f"{self.path / WEIGHTS_NAME} does not fit this model: "
                f"{len(missing)} of {len(chosen)} layers are missing a block, "
                f"{len(foreign)} blocks have no layer",
                expected=f"a block for {some(missing)}" if missing else f"{len(chosen)} blocks",
                found=f"blocks for {some(foreign)}" if foreign else f"{len(self.blocks)} blocks",
                next_step="check that the adapter is this base's and that its file is whole",
            )
        for site in chosen:
            self._check_shape(site)
        return chosen

    def _check_shape(self, site: LinearSite) -> None:
        config = self.config
        shape = METHODS[config.method].block_shape(
            site.in_features, site.out_features, config.r, config.mini_r
        )
        actual = tuple(self.blocks[site.name].shape)
        if actual != shape:
            raise AdapterError(
                f"{self.path / WEIGHTS_NAME}: the block of {site.name} has the wrong shape",
                expected=f"{list(shape)} for {config.method} with r={config.r} on a layer"
                f" {site.in_features} -> {site.out_features}",
                found=list(actual),
                next_step="check that the adapter was trained on a base model of this width",
            )


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
    config = BoneConfig.from_pretrained(folder)
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise AdapterError(
            f"no {WEIGHTS_NAME} in {folder}",
            found=", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "an empty folder",
            next_step="save the adapter again with safe_serialization=True; pickles are not read",
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise AdapterError(
            f"{path} is not a readable safetensors file",
            found=str(error),
            next_step="copy or save the adapter again",
        ) from None
    adapter = _sorted(folder, config, tensors)
    if not adapter.blocks:
        raise AdapterError(
            f"{path} holds no block",
            expected=f"keys that end in .{_BLOCK_OF_TYPE[str(config.peft_type)]}",
            found=some(list(tensors)),
            next_step="save the adapter again, or correct peft_type in its configuration",
        )
    for key, tensor in {**adapter.blocks, **adapter.modules_to_save}.items():
        is_count = key not in adapter.blocks and not tensor.is_complex()  # of a batch norm
        if not tensor.is_floating_point() and not is_count:
            raise AdapterError(
                f"{path}: {key} holds no floats",
                expected="float32",
                found=str(tensor.dtype),
                next_step="save the adapter again, without quantizing it",
            )
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(
                f"{path}: {key} holds NaN or Inf",
                expected="finite values",
                next_step="train again from a sound state",
            )
    blocks = {site: block.float() for site, block in adapter.blocks.items()}
    return replace(adapter, blocks=blocks)


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


def write_adapter(
    directory: str | Path,
    config: BoneConfig,
    blocks: Mapping[str, Tensor],
    modules_to_save: Mapping[str, Tensor],
    *,
    as_safetensors: bool = True,
) -> Path:
    """Write an adapter folder that PEFT 0.18.1 loads.

    Earlier files are replaced only when the new ones are whole.

    Args:
        directory: The folder, which is made if needed.
        config: The adapter's configuration.
        blocks: Block by site.
        modules_to_save: Tensor by name of each parameter that the adapter brings whole.
        as_safetensors: False writes PEFT's pickle, which only PEFT reads again.

    Returns:
        The folder.

    Raises:
        UsageError: There is a file of that name.
    """
    folder = Path(directory)
    if folder.is_file():
        raise UsageError(
            f"{folder} is a file", expected="a folder, or a name for one", next_step="give another"
        )
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: tensor.detach().cpu().contiguous().clone()
        for key, tensor in sorted(adapter_tensors(config, blocks, modules_to_save).items())
    }
    written, other = (WEIGHTS_NAME, PICKLE_NAME) if as_safetensors else (PICKLE_NAME, WEIGHTS_NAME)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".staging-") as staging:
        if as_safetensors:
            save_file(tensors, Path(staging) / written, metadata={"format": "pt"})
        else:
            torch.save(tensors, Path(staging) / written)
        config.save_pretrained(staging)
        for name in (written, CONFIG_NAME):
            os.replace(Path(staging) / name, folder / name)
    (folder / other).unlink(missing_ok=True)  # or PEFT would read the weights of an earlier save
    return folder


def adapter_tensors(
    config: BoneConfig, blocks: Mapping[str, Tensor], modules_to_save: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that they have in its file."""
    leaf = _BLOCK_OF_TYPE[str(config.peft_type)]
    tensors = {f"{_PREFIX}{site}.{leaf}": block for site, block in blocks.items()}
    return tensors | {f"{_PREFIX}{name}": tensor for name, tensor in modules_to_save.items()}


def adapter_of_tensors(
    config: BoneConfig, tensors: Mapping[str, Tensor], where: str
) -> AdapterFolder:
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
            expected=f"keys that end in .{_BLOCK_OF_TYPE[str(config.peft_type)]}",
            found=some(list(adapter.unused or tensors)),
            next_step="take them from get_peft_model_state_dict or from an adapter's file",
        )
    return adapter


def _sorted(folder: Path, config: BoneConfig, tensors: Mapping[str, Tensor]) -> AdapterFolder:
    """The tensors of an adapter file by what they are."""
    leaf = f".{_BLOCK_OF_TYPE[str(config.peft_type)]}"
    blocks: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    in_base: set[str] = set()
    unused: list[str] = []
    names = (key.removeprefix(_PREFIX) for key in tensors)
    sites = {name.removesuffix(leaf) for name in names if name.endswith(leaf)}
    for key in sorted(tensors, key=lambda key: (_BASE_LAYER in key, key)):
        name = key.removeprefix(_PREFIX)
        parameter = name.replace(_BASE_LAYER, ".")
        if name.endswith(leaf) and name.removesuffix(leaf) not in blocks:
            blocks[name.removesuffix(leaf)] = tensors[key]
        elif f"{leaf}." in name or any(part in name for part in _SECOND_COPIES):
            continue
        elif _BLOCK_KEY.search(name) or parameter in saved or name.rpartition(".")[0] in sites:
            unused.append(key)
        else:
            saved[parameter] = tensors[key]
            if not is_trained_whole(config, parameter):
                in_base.add(parameter)
    return AdapterFolder(folder, config, blocks, saved, frozenset(in_base), tuple(unused))


Adapters = Sequence[tuple[str, AdapterFolder]]
"""Adapters by name, in the order in which they apply."""


def read_adapters(
    paths: Sequence[str | Path] | Mapping[str, str | Path],
) -> list[tuple[str, AdapterFolder]]:
    """Several adapter folders with the names they go by: given ones, or those of `adapter_names`.

    Raises:
        UsageError: A folder is given twice.
        AdapterError: A folder holds no adapter that can be used.
    """
    if not isinstance(paths, Mapping):
        paths = dict(zip(adapter_names(paths), paths, strict=True))
    folders = {name: Path(path).resolve() for name, path in paths.items()}
    if len(set(folders.values())) < len(folders):
        _refuse_twice(list(folders.values()))
    return [(name, read_adapter(path)) for name, path in paths.items()]


def adapter_names(paths: Sequence[str | Path]) -> list[str]:
    """The names that adapters go by which were given none.

    One is `default`. Several have their folders' names, with as many of the folders above as tell
    them apart: `run1/checkpoint-500` and `run2/checkpoint-500`.

    Raises:
        UsageError: A folder is given twice, or one is given without a list around it.
    """
    if isinstance(paths, str | Path):
        raise UsageError(
            "adapters is one path",
            expected="a list of folders, or a dict of names and folders",
            found=repr(str(paths)),
            next_step=f"adapters=[{str(paths)!r}]",
        )
    folders = [Path(path).resolve() for path in paths]
    if len(set(folders)) < len(folders):
        _refuse_twice(folders)
    return ["default"] if len(paths) == 1 else [_name_among(f, folders) for f in folders]


def _refuse_twice(folders: Sequence[Path]) -> None:
    twice = next(folder for folder in folders if folders.count(folder) > 1)
    raise UsageError(
        f"the adapter {twice} is given twice",
        next_step="name it once: an adapter applies once",
    )


def _name_among(folder: Path, folders: Sequence[Path]) -> str:
    """The shortest end of a folder's path that no other folder's path has."""
    ends = (folder.parts[-count:] for count in range(1, len(folder.parts)))
    own = next(
        (
            end
            for end in ends
            if not any(f.parts[-len(end) :] == end for f in folders if f != folder)
        ),
        folder.parts,
    )
    return "/".join(own)
