"""Adapter folders written by hand, to be changed one thing at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PREFIX = "base_model.model."
UP, Q = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


def pairs(r: int = 4) -> dict[str, Tensor]:
    """A and B of two layers of `peft_cases.llama`, by PEFT's names without their prefix."""
    generator = torch.Generator().manual_seed(3)
    shapes = {UP: (48, 80), Q: (48, 48)}
    tensors = {}
    for site, (inputs, outputs) in shapes.items():
        tensors[f"{site}.lora_A.weight"] = torch.randn(r, inputs, generator=generator)
        tensors[f"{site}.lora_B.weight"] = torch.randn(outputs, r, generator=generator)
    return tensors


def write(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """Write a folder: tensors under their whole names, and a configuration."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {
        "peft_type": "LORA",
        "peft_version": "0.18.1",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": [UP, Q],
        "task_type": "CAUSAL_LM",
        "init_lora_weights": True,
        "lora_dropout": 0.05,
        "bias": "none",
        "use_dora": False,
        **fields,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def under_prefix(tensors: dict[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Tensors as PEFT names them."""
    return {prefix + name: tensor for name, tensor in tensors.items()}
