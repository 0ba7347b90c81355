"""Adapter folders that PEFT 0.18.1 loads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from bone_fx.adapter_folder.folder import LEAF_OF_TYPE, PREFIX, WEIGHTS_NAME
from bone_fx.config import CONFIG_NAME, BoneConfig
from bone_fx.errors import UsageError

PICKLE_NAME = "adapter_model.bin"


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
        # safetensors writes a file for its owner alone, whatever the umask.
        shutil.copymode(Path(staging) / CONFIG_NAME, Path(staging) / written)
        for name in (written, CONFIG_NAME):
            os.replace(Path(staging) / name, folder / name)
    (folder / other).unlink(missing_ok=True)  # or PEFT would read the weights of an earlier save
    return folder


def adapter_tensors(
    config: BoneConfig, blocks: Mapping[str, Tensor], modules_to_save: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that they have in its file."""
    leaf = LEAF_OF_TYPE[str(config.peft_type)]
    tensors = {f"{PREFIX}{site}.{leaf}": block for site, block in blocks.items()}
    return tensors | {f"{PREFIX}{name}": tensor for name, tensor in modules_to_save.items()}
