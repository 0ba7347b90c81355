"""PEFT's functions on an adapter's state, under PEFT's names and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bone_fx.errors import UsageError
from bone_fx.train.adapted_module import AdaptedModule, LoadResult
from bone_fx.train.mounting import named_buffers


def get_peft_model_state_dict(
    model: AdaptedModule,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> dict[str, Tensor]:
    """An adapter's tensors under the names that they have in its file.

    Args:
        model: The adapted module.
        state_dict: Values to take instead of the module's own, under its own names.
        adapter_name: The adapter.

    Raises:
        UsageError: There is no adapter of that name.
    """
    return model.get_adapter_state(adapter_name, state_dict)


def set_peft_model_state_dict(
    model: AdaptedModule,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
) -> LoadResult:
    """Write tensors of an adapter's file into an adapter, in place; optimizers stay valid.

    Args:
        model: The adapted module.
        peft_model_state_dict: The tensors, all of them.
        adapter_name: The adapter.

    Raises:
        AdapterError: A tensor is missing, belongs to no part of the adapter, or has another shape.
    """
    model.set_adapter_state(peft_model_state_dict, adapter_name)
    return LoadResult([], [])


def hotswap_adapter(
    model: AdaptedModule,
    model_name_or_path: str | Path,
    adapter_name: str,
    torch_device: str | None = None,
    **hub: Any,
) -> None:
    """Put a saved adapter's values in place of an adapter's own; no graph is written anew.

    Args:
        model: The adapted module.
        model_name_or_path: The saved adapter's folder, or a hub id.
        adapter_name: The adapter whose values are replaced.
        torch_device: Taken as PEFT takes it; values go where the parameters are.
        **hub: `revision`, `subfolder`, `token` and `cache_dir` for the hub.

    Raises:
        AdapterError: The saved adapter is of another method, or has other layers or shapes.
    """
    model.hotswap_adapter(model_name_or_path, adapter_name, **hub)


def get_base_model_state_dict(model: AdaptedModule) -> dict[str, Tensor]:
    """The base's tensors under its own names, of PEFT 0.21: without blocks, as they are now.

    Args:
        model: The adapted module; merging changes none of these.

    Raises:
        UsageError: It was not made from a model.
    """
    here: dict[str, Tensor] = dict(model._base.named_parameters(remove_duplicate=False))
    here |= named_buffers(model)
    own = model.get_base_model().state_dict()
    return {name: here.get(name, value).detach() for name, value in own.items()}


def set_base_model_state_dict(
    model: AdaptedModule, state_dict: Mapping[str, Tensor], strict: bool = True
) -> LoadResult:
    """Write tensors into the base in place, of PEFT 0.21; the model it shares them with has them.

    Args:
        model: The adapted module.
        state_dict: Tensors under the model's own names.
        strict: Whether they must be all and no others.

    Raises:
        UsageError: Names that do not fit, and `strict`; another shape; an adapter is merged.
    """
    if model.merged_adapters:
        raise UsageError("an adapter is merged into the base", next_step="unmerge_adapter()")
    current = get_base_model_state_dict(model)
    missing = sorted(current.keys() - state_dict.keys())
    unexpected = sorted(state_dict.keys() - current.keys())
    if strict and (missing or unexpected):
        raise UsageError(
            "the tensors are not those of the base",
            expected=f"{len(current)} tensors, {', '.join(missing[:3]) or 'none'} among them",
            found=f"{len(state_dict)} tensors, {', '.join(unexpected[:3]) or 'none'} beside them",
            next_step="pass strict=False to take those that fit",
        )
    fitting = {name: value for name, value in state_dict.items() if name in current}
    for name, value in fitting.items():
        if value.shape != current[name].shape:
            shapes = (str(list(tensor.shape)) for tensor in (current[name], value))
            raise UsageError(f"{name} has another shape", expected=next(shapes), found=next(shapes))
    with torch.no_grad():
        for name, value in fitting.items():
            current[name].copy_(value)
    return LoadResult(missing, unexpected)
