"""The library that the operators are registered in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY: Any = torch.library.Library("bone_fx", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, composite: Callable[..., Any]) -> Any:
    """Register a composite operator; returns `torch.ops.bone_fx.<name>.default`."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, composite, "CompositeImplicitAutograd")
    return getattr(torch.ops.bone_fx, name).default


def register_opaque(schema: str, on_cpu: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an operator of a CPU that `torch.compile` calls and does not look into.

    Args:
        schema: Of the operator; it writes to no argument.
        on_cpu: What it computes.
        fake: A tensor of the result's shape and dtype.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"bone_fx::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.bone_fx, name).default
