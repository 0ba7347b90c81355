"""A LoRA's folder as PEFT writes it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file

from bone_fx.adapter_folder import WEIGHTS_NAME, TrainedFolder
from bone_fx.adapter_folder.folder import PREFIX
from bone_fx.adapters import LowRank
from bone_fx.config import CONFIG_NAME, PEFT_VERSION
from bone_fx.sites import LinearSite


def write_lora(
    target: Path,
    folder: TrainedFolder,
    sites: Mapping[str, LinearSite],
    pairs: Mapping[str, LowRank],
    modules: list[str],
) -> None:
    """Write a LoRA's configuration and tensors.

    Args:
        target: Where they go.
        folder: The adapter that it is made of, with what it trained whole.
        sites: The adapted layers by name.
        pairs: Their LoRAs.
        modules: Names of all modules of the base, among which the targets choose.
    """
    config = folder.config
    rank = max(pair.rank for pair in pairs.values())
    smaller = {name: pair.rank for name, pair in pairs.items() if pair.rank < rank}
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        # A pattern is matched as a regular expression that ends the name.
        "rank_pattern": {_escaped(name): number for name, number in smaller.items()},
        "alpha_pattern": {_escaped(name): number for name, number in smaller.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": any(site.transposed for site in sites.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": _targets(set(sites), modules),
        "modules_to_save": config.modules_to_save,
        "task_type": config.task_type,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "auto_mapping": config.auto_mapping,
        "peft_version": PEFT_VERSION,
    }
    (target / CONFIG_NAME).write_text(json.dumps(dict(sorted(fields.items())), indent=2) + "\n")
    tensors = {
        f"{PREFIX}{name}.lora_{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in (("A", pair.a), ("B", pair.b))
    }
    for name, tensor in folder.modules_to_save.items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{PREFIX}{module}.base_layer.{leaf}" if module in sites else PREFIX + name] = (
            tensor
        )
    save_file(tensors, target / WEIGHTS_NAME, metadata={"format": "pt"})
    shutil.copymode(target / CONFIG_NAME, target / WEIGHTS_NAME)  # safetensors': 0600


def _targets(names: set[str], modules: list[str]) -> list[str]:
    """Last parts of the layers' names if these choose them and nothing else, else whole names."""
    ends = sorted({name.rpartition(".")[2] for name in names})
    chosen = {
        module for module in modules if f".{module}".endswith(tuple(f".{end}" for end in ends))
    }
    return ends if chosen == names else sorted(names)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")
