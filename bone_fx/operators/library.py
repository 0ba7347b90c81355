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
