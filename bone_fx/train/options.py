"""PEFT's options of loading: those of the hub, and those that have no meaning here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bone_fx.errors import UsageError

_HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_WITHOUT_EFFECT = frozenset(
    {
        *("ephemeral_gpu_offload", "ignore_mismatched_sizes", "low_cpu_mem_usage"),
        *("device_map", "max_memory", "offload_folder", "torch_device", "use_safetensors"),
    }
)
"""They choose how PEFT gets to the result: blocks lie where their layers do."""


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a load that concern the hub.

    Args:
        options: As a caller of `load_adapter` or `from_pretrained` gave them.

    Raises:
        UsageError: An option that would change what is loaded, and is not known here.
    """
    unknown = sorted(
        name
        for name, value in options.items()
        if name not in _HUB and name not in _WITHOUT_EFFECT and value is not None
    )
    if unknown:
        raise UsageError(
            f"the option {unknown[0]} has no meaning here",
            expected=", ".join(_HUB),
            next_step="leave it out",
        )
    return {name: options[name] for name in _HUB if options.get(name) is not None}
