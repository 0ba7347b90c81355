"""PEFT's functions on an adapter's state, under PEFT's names and arguments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bone_fx.train.adapted_module import AdaptedModule, LoadResult


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
