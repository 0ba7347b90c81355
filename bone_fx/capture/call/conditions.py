"""What the sizes of a call must satisfy for a trace to be the model's own path.

While tracing, every decision that the model's code takes on a size (`if length % 2`, `if length >
window`) becomes a condition, and a graph says nothing of the other path. The tracer also assumes of
every size that it is not one, which is no decision of the model; so for a call with a size of one
the conditions that only say so are passed over: those that hold for all sizes of two and more. They
are Python functions, which `torch.compile` traces: a compiled call has them as guards.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
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
_SIZE = re.compile(r"L(\[[^\]]*\])+\.size\(\)\[\d+\]")
"""How a condition names a size of an argument."""

_HOLDS: dict[type[ast.cmpop], Callable[[sympy.Expr], bool | None]] = {
    ast.NotEq: lambda difference: difference.is_nonzero,
    ast.GtE: lambda difference: difference.is_nonnegative,
    ast.Gt: lambda difference: difference.is_positive,
    ast.LtE: lambda difference: difference.is_nonpositive,
    ast.Lt: lambda difference: difference.is_negative,
}
"""What the difference of its two sides must be for a comparison to hold."""


@dataclass(frozen=True)
class Conditions:
    """Conditions on the sizes of a call.

    Attributes:
        texts: Python expressions over `L[<argument>]`.
    """

    texts: tuple[str, ...] = ()
    _checks: tuple[Callable[[Mapping[str, Any]], bool], ...] = field(
        init=False, repr=False, compare=False
    )
    _about_ones: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        checks = tuple(eval(f"lambda L: {text}", dict(_NAMES)) for text in self.texts)
        object.__setattr__(self, "_checks", checks)
        object.__setattr__(self, "_about_ones", frozenset(filter(_holds_from_two, self.texts)))

    def __reduce__(self) -> Any:
        return Conditions, (self.texts,)

    def require(self, arguments: Mapping[str, Any]) -> None:
        """Raises `InputRefusedError` where the sizes lead the model along another path."""
        if not self.texts:
            return
        tensors = {
            name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)
        }
        with_one = any(1 in value.shape for value in tensors.values())
        for text, check in zip(self.texts, self._checks, strict=True):
            if with_one and text in self._about_ones:
                continue
            try:
                holds = check(arguments)
            except (NameError, ZeroDivisionError):
                continue  # a function that only the tracer has, or a quotient that is not one
            if not holds:
                raise InputRefusedError(
                    "these sizes take another path through the model than the example inputs did",
                    expected=text.replace("L['", "").replace("']", "").replace(".size()", ".shape"),
                    found={name: list(value.shape) for name, value in tensors.items()},
                    next_step="capture again with example inputs of such sizes",
                )


def conditions_of(program: torch.export.ExportedProgram) -> Conditions:
    """The conditions on sizes that a program was traced under.

    They are what `ExportedProgram.module()` would check in its `_guards_fn` (torch 2.13:
    `_guards_code`); strides are left out.
    """
    texts = (text for text in program._guards_code if ".size()" in text and "stride" not in text)
    return Conditions(tuple(dict.fromkeys(texts)))


def _holds_from_two(text: str) -> bool:
    """Whether a condition is known to hold for all sizes of two and more: it is about ones only."""
    symbols: dict[str, str] = {}
    named = _SIZE.sub(lambda size: symbols.setdefault(size[0], f"s{len(symbols)}"), text)
    comparison = ast.parse(named, mode="eval").body
    if not isinstance(comparison, ast.Compare) or len(comparison.ops) > 1:
        return False
    sizes = {
        name: 2 + sympy.Symbol(name, integer=True, nonnegative=True) for name in symbols.values()
    }
    left, right = ast.unparse(comparison.left), ast.unparse(comparison.comparators[0])
    try:
        difference = sympy.expand(eval(f"({left}) - ({right})", dict(_NAMES), sizes))
    except (NameError, TypeError):  # not a polynomial of the sizes
        return False
    holds = _HOLDS.get(type(comparison.ops[0]))
    return holds is not None and bool(holds(difference))
