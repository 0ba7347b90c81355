"""Biases of layers that have none in the base: a LoRA with `lora_bias` brings them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn


def lacking_biases(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Those of some names that would be the bias of a linear layer without one."""
    modules = dict(model.named_modules())
    return frozenset(name for name in names if _layer_of(modules, name) is not None)


def add_biases(model: nn.Module, names: Iterable[str]) -> None:
    """Give layers a bias of zeros, of the kind that their weight is: real, fake or meta."""
    modules = dict(model.named_modules())
    for name in names:
        layer = _layer_of(modules, name)
        if layer is not None:
            weight = layer.get_parameter("weight")
            values = weight.new_zeros(weight.shape[0])
            layer.bias = nn.Parameter(values, requires_grad=False)


def _layer_of(modules: Mapping[str, nn.Module], name: str) -> nn.Linear | None:
    path, _, attribute = name.rpartition(".")
    layer = modules.get(path) if attribute == "bias" else None
    return layer if isinstance(layer, nn.Linear) and layer.bias is None else None
