"""What the sizes of a call must satisfy for a trace to be the model's own path.

While tracing, every decision that the model's code takes on a size (`if length % 2`, `if length >
window`) becomes a condition, and a graph says nothing of the other path. The tracer also assumes of
every size that it is not one, which is no decision of the model; so for a call with a size of one
the conditions that only say so are passed over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch

from bone_fx.errors import InputRefusedError

_NAMES = {
    "__builtins__": {},
    "math": math,
    "max": max,
    "min": min,
    "int": int,
    "float": float,
    "abs": abs,
}
_NOT_ONE = (" != ", " >= ")
"""Conditions that a size of one may break without another path being taken."""


def conditions_of(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The conditions on sizes that a program was traced under, over `L[<argument>]`.

    They are what `ExportedProgram.module()` would check in its `_guards_fn` (torch 2.13:
    `_guards_code`); strides are left out.
    """
    return tuple(
        dict.fromkeys(
            code for code in program._guards_code if ".size()" in code and "stride" not in code
        )
    )


def check_conditions(conditions: tuple[str, ...], given: Mapping[str, Any]) -> None:
    """Raises `InputRefusedError` if the sizes of `given` lead the model along another path."""
    if not conditions:
        return
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    with_one = any(1 in value.shape for value in tensors.values())
    for condition, code in zip(conditions, _compiled(conditions), strict=True):
        if with_one and any(sign in condition for sign in _NOT_ONE):
            continue
        try:
            holds = eval(code, _NAMES, {"L": given})
        except (NameError, ZeroDivisionError):
            continue  # a function that only the tracer has, or a quotient of sizes that is not one
        if not holds:
            shown = condition.replace("L['", "").replace("']", "").replace(".size()", ".shape")
            raise InputRefusedError(
                "these sizes take another path through the model than the example inputs did",
                expected=shown,
                found={name: list(value.shape) for name, value in tensors.items()},
                next_step="capture again with example inputs of such sizes",
            )


@functools.lru_cache(maxsize=64)
def _compiled(conditions: tuple[str, ...]) -> tuple[CodeType, ...]:
    return tuple(compile(condition, "<condition on the sizes>", "eval") for condition in conditions)
