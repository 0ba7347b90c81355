"""An adapter's view: what its files say, what would be refused, and how it fits a base.

1. The folder is listed; with links that leave it, or pipes, nothing in it is read.
2. Configuration and tensors are read as far as they can be, also of an adapter that is refused.
3. The adapter is read as an export reads it: what that refuses is noted.
4. With a base, the adapter is matched with it and folded, one weight at a time; nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bone_fx.adapter_folder import WEIGHTS_NAME, AdapterFolder, read_adapters
from bone_fx.config import CONFIG_NAME
from bone_fx.deploy.companions.choice import companion_files
from bone_fx.deploy.input_files import local_adapter
from bone_fx.deploy.report.origin import read_origin
from bone_fx.errors import AdapterError, BoneFxError
from bone_fx.files.inputs import is_plain_file, unsafe_entries
from bone_fx.files.json_file import NotJsonError, read_object
from bone_fx.files.nearby import meant
from bone_fx.lora.keys import plain, read_key
from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.storage.safetensors_file import read_header, read_tensor

_PREFIX = "base_model.model."
_BLOCKS = (".bone_block", ".miss_block")
_FIELDS = (
    *("peft_type", "r", "init_weights", "mini_r", "miss_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "modules_to_save", "bias", "task_type"),
    *("lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_parameters"),
    *("trainable_token_indices", "base_model_name_or_path"),
)
_CARD = ("README.md", "LICENSE")


def inspect_adapter(
    adapter: str | Path,
    *,
    base: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_unused: Sequence[str] = (),
) -> dict[str, Any]:
    """What an adapter folder holds.

    Args:
        adapter: The folder, or a hub id.
        base: A base to match it with: Hugging Face folder, GGUF file or hub id.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
        allow_unused: Tensors that may be left out, as for an export.

    Returns:
        `adapter`, `config`, `method`, `blocks` and `saved` (name, shape, dtype and norm of each
        tensor), `unused`, `files`, `origin`, `refused` and `notes`; with a base also `base`: its
        class, how many of its layers are adapted, and how far each weight is moved.

    Raises:
        AdapterError: There is no such folder.
    """
    folder = local_adapter(adapter)
    if not folder.is_dir():
        raise AdapterError(
            f"there is no adapter folder {adapter}", next_step=meant(adapter, "check the path")
        )
    if not (folder / CONFIG_NAME).exists() and (folder / "default" / CONFIG_NAME).exists():
        folder = folder / "default"
    view: dict[str, Any] = {
        "adapter": str(adapter),
        "config": {},
        "method": None,
        "blocks": [],
        "saved": [],
        "unused": [],
        "files": _files(folder),
        "origin": {},
        "refused": [],
        "notes": [],
    }
    read = _read(folder, view)
    if not _is_unsafe(folder):
        view["config"] = _config(folder)
        view["origin"] = read_origin(folder)
        view["blocks"], view["saved"] = _tensors(folder / WEIGHTS_NAME)
    if read is not None:
        view |= {"method": read.config.method, "unused": list(read.unused)}
    if base is not None and read is not None:
        try:
            view["base"] = _fit(read, base, view, trust_remote_code, revision, allow_unused)
        except BoneFxError as error:
            view["refused"].append(_refusal(error))
    elif read is not None and read.unused and not allow_unused:
        names = ", ".join(read.unused[:3])
        view["notes"].append(f"tensors that mean nothing for this kind of adapter: {names}")
    return view


def _read(folder: Path, view: dict[str, Any]) -> AdapterFolder | None:
    try:
        [(_, read)] = read_adapters([folder])
    except BoneFxError as error:
        view["refused"].append(_refusal(error))
        return None
    return read


def _refusal(error: BoneFxError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "exit_code": error.exit_code,
        "message": str(error),
    }


def _is_unsafe(folder: Path) -> bool:
    try:
        return bool(unsafe_entries(folder))
    except OSError:
        return True


def _config(folder: Path) -> dict[str, Any]:
    """The fields of the configuration that say what the adapter is, as they stand there."""
    try:
        content = read_object(folder / CONFIG_NAME)
    except (FileNotFoundError, NotJsonError):
        return {}
    return {name: _plain(content[name]) for name in _FIELDS if content.get(name) is not None}


def _plain(value: Any) -> Any:
    """A value that JSON has: NaN and infinities are none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if not isinstance(value, dict) else str(value)


def _tensors(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The blocks and the other tensors of an adapter's file, read one at a time."""
    blocks: list[dict[str, Any]] = []
    saved: list[dict[str, Any]] = []
    if not is_plain_file(path):
        return blocks, saved
    try:
        header = read_header(path)
    except BoneFxError:
        return blocks, saved
    for key, entry in header.items():
        name, of_lora = key.removeprefix(_PREFIX), read_key(plain(key))
        leaf = next((leaf for leaf in _BLOCKS if name.endswith(leaf)), None)
        if of_lora is not None:
            name, leaf = of_lora.site, ""
        norm = None
        if entry.dtype.is_floating_point:
            norm = _three_digits(float(read_tensor(path, entry).double().norm()))
        row = {
            "name": name if leaf is None else name.removesuffix(leaf),
            "shape": list(entry.shape),
            "dtype": str(entry.dtype).removeprefix("torch."),
            "norm": norm,
        }
        if of_lora is not None:
            row["part"] = ".".join((of_lora.leaf, of_lora.end)).removesuffix(".weight").rstrip(".")
        (saved if leaf is None else blocks).append(row)
    return blocks, saved


def _three_digits(value: float) -> float | None:
    return float(f"{value:.3g}") if math.isfinite(value) else None


def _files(folder: Path) -> list[dict[str, Any]]:
    """The files beside each other in the folder, and what becomes of each."""
    known = {CONFIG_NAME: "configuration", WEIGHTS_NAME: "tensors"}
    known |= {path.name: "goes into the output" for path in companion_files(folder)}
    known |= dict.fromkeys(_CARD, "licence and base are read")
    files = []
    for path in sorted(folder.iterdir()):
        use = known.get(path.name, "not used")
        if path.suffix == ".py":
            use = "code: neither run nor copied"
        is_file = is_plain_file(path)
        if not is_file:
            use = "a folder" if path.is_dir() else "no file"
        size = path.stat().st_size if is_file else None
        files.append({"name": path.name, "bytes": size, "use": use})
    return files


def _fit(
    adapter: AdapterFolder,
    base: str | Path,
    view: dict[str, Any],
    trust_remote_code: bool,
    revision: str | None,
    allow_unused: Sequence[str],
) -> dict[str, Any]:
    """The base that the adapter is matched with, and what the adapter does to it."""
    from bone_fx.deploy.checkpoint_inputs import open_checkpoint
    from bone_fx.dialects import find_module_sites
    from bone_fx.weights.writing.stream import workers

    inputs = open_checkpoint(
        base,
        [("default", adapter)],
        trust_remote_code=trust_remote_code,
        revision=revision,
        allow_unused=allow_unused,
    )
    folded = inputs.fold(torch.float32)
    view["notes"] += folded.notes
    layers, _ = find_module_sites(folded.skeleton.model)
    with workers() as pool:
        list(pool.map(_fold, [folded.recipes[s.weight_name] for s in folded.sites.values()]))
    change: Mapping[str, float | None] = folded.change.report()
    for row in view["blocks"]:
        site = folded.sites.get(row["name"])
        if site is not None:
            row |= {
                "in_features": site.in_features,
                "out_features": site.out_features,
                "change": change.get(row["name"]),
            }
    return {
        "name": inputs.checkpoint.name,
        "architecture": inputs.architecture.__name__,
        "layers": len(layers),
        "adapted": len(folded.sites),
        "from_the_adapter": sorted(inputs.heads),
        "untied": sorted(inputs.untied),
    }


def _fold(recipe: Recipe) -> None:
    """Compute a folded weight, which tells how far it is moved, and forget it."""
    recipe.evaluate()
