"""An adapter's folder as PEFT lays it out, read for verification by a path of its own.

Nothing of the exporter's reading stands here: keys name the layers, and shapes name the sizes. A
mistake of the exporter's reader or of its sites shows as a difference.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

BAT = "bat"
_PREFIX = "base_model.model."
_LEAVES = {"BONE": "bone_block", "MISS": "miss_block"}
_BASE_LAYER = ".base_layer."
_WRAPPED = ".modules_to_save."
"""In a second copy of a module that PEFT saves with its embeddings."""
_NOT_READ = {*_LEAVES.values(), "original_module"}


@dataclass(frozen=True)
class PeftAdapter:
    """What an adapter's folder holds.

    Attributes:
        folder: The folder.
        kind: `"bat"`, or `"bone"` for what adds a block to the weight, MiSS mini among it.
        blocks: Block by name of the layer, in float32.
        parameters: What was trained whole, in float32, by name of the parameter.
    """

    folder: Path
    kind: str
    blocks: dict[str, Tensor]
    parameters: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path, given_up: Collection[str] = ()) -> PeftAdapter:
        """Read `adapter_config.json` and `adapter_model.safetensors` of a folder.

        Args:
            folder: The folder.
            given_up: Tensors that the person gave up, by their keys or names.
        """
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        leaf = f".{_LEAVES[config['peft_type']]}"
        blocks, parameters = {}, {}
        for key, tensor in sorted(load_file(folder / "adapter_model.safetensors").items()):
            name = key.removeprefix(_PREFIX)
            if given_up and {key, name, name.replace(_BASE_LAYER, ".")} & set(given_up):
                continue
            if name.endswith(leaf):
                blocks[name.removesuffix(leaf)] = tensor.float()
            elif not {*name.split(".")} & _NOT_READ:
                plain = name.replace(_BASE_LAYER, ".").replace(_WRAPPED, ".")
                if plain == name or plain not in parameters:
                    parameters[plain] = tensor.float()
        kind = BAT if config.get("init_weights") == BAT else "bone"
        return cls(folder, kind, blocks, parameters)
