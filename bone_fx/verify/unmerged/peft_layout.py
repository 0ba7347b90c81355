"""An adapter's folder as PEFT lays it out, read for verification by a path of its own.

Nothing of the exporter's reading stands here: keys name the layers, and shapes name the sizes. A
mistake of the exporter's reader or of its sites shows as a difference.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from bone_fx.adapters import Block
from bone_fx.verify.unmerged.lora_layout import lora_tensors, plain_name, whole_parameter

BAT, DORA, LORA = "bat", "dora", "lora"
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
        kind: `"lora"`, `"dora"`, `"bat"`, or `"bone"` for what adds a block to the weight, MiSS
            mini among it.
        blocks: Block by name of the layer or of the parameter, in float32.
        parameters: What was trained whole, in float32, by name of the parameter.
        biases: What is added to a layer's bias, in float32, by name of the layer.
        rows: Numbers and values of rows of embeddings that are replaced, by name of the layer.
    """

    folder: Path
    kind: str
    blocks: Mapping[str, Block]
    parameters: dict[str, Tensor]
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, tuple[list[int], Tensor]] = field(default_factory=dict)

    @classmethod
    def read(
        cls, folder: Path, given_up: Collection[str] = (), model: nn.Module | None = None
    ) -> PeftAdapter:
        """Read `adapter_config.json` and `adapter_model.safetensors` of a folder.

        Args:
            folder: The folder.
            given_up: Tensors that the person gave up, by their keys or names.
            model: The model that the adapter acts on; a LoRA is read with it.
        """
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        if config["peft_type"] == "LORA":
            assert model is not None
            return _lora(folder, config, tensors, given_up, model)
        leaf = f".{_LEAVES[config['peft_type']]}"
        blocks, parameters = {}, {}
        for key, tensor in sorted(tensors.items()):
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


def _lora(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    given_up: Collection[str],
    model: nn.Module,
) -> PeftAdapter:
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = plain_name(key)
        if not {key, name, whole_parameter(name)} & set(given_up):
            kept[name] = tensor.float()
    blocks, biases, rows, left = lora_tensors(config, kept, model)
    parameters: dict[str, Tensor] = {}
    for name in left:
        if "original_module" not in name.split("."):
            parameters.setdefault(whole_parameter(name), kept[name])
    kind = DORA if config.get("use_dora") else LORA
    return PeftAdapter(folder, kind, blocks, parameters, biases, rows)
