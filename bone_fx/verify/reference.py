"""The torch side of verification: the base, under its unmerged adapters, and with them folded.

The reference is the model as transformers runs it, with the adapters applied by hooks on its
layers: no graph of ours, no recipe, no translation stands in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.adapter_folder import AdapterFolder
from bone_fx.operators.adapted_linear import adapted_linear
from bone_fx.passes.fold import fold_weight
from bone_fx.sites import LinearSite

Adapters = Sequence[tuple[str, AdapterFolder]]


def load_heads(model: nn.Module, adapters: Adapters) -> None:
    """Put the adapters' `modules_to_save` into a model, in place."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for _, adapter in adapters:
            for name, tensor in adapter.modules_to_save.items():
                parameters[name].copy_(tensor)


@contextmanager
def unmerged(
    model: nn.Module, sites: Mapping[str, LinearSite], adapters: Adapters
) -> Iterator[None]:
    """A context in which a model's layers run under their adapters, not folded."""
    handles = []
    for name, site in sites.items():
        steps = _steps(name, adapters)
        if steps:
            handles.append(model.get_submodule(name).register_forward_hook(_hook(site, steps)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def fold_in_place(model: nn.Module, sites: Mapping[str, LinearSite], adapters: Adapters) -> None:
    """Fold the adapters into a model's weights, in place, with the eager back end."""
    with torch.no_grad():
        for name, site in sites.items():
            steps = _steps(name, adapters)
            if steps:
                weight = model.get_parameter(site.weight_name)
                weight.copy_(fold_weight(weight, steps, transposed=site.transposed, layer=name))


def _steps(site: str, adapters: Adapters) -> list[tuple[str, Tensor]]:
    return [
        (folder.config.method, folder.blocks[site])
        for _, folder in adapters
        if site in folder.blocks
    ]


def _hook(site: LinearSite, steps: list[tuple[str, Tensor]]) -> Any:
    methods, blocks = [m for m, _ in steps], [b for _, b in steps]

    def apply(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> Tensor:
        weight = module.get_parameter("weight")
        bias: Tensor | None = getattr(module, "bias", None)
        return adapted_linear(args[0], weight, bias, blocks, methods, [], site.transposed)

    return apply
