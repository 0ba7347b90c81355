"""Activations: a GELU that a model writes out is recognised by what it computes.

A candidate is a module without parameters, buffers and children that takes one tensor. It is run on
numbers where the GELU, its tanh approximation and other activations differ; what agrees with one of
the two becomes `aten.gelu`, which is one operator, and the rest stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from bone_fx.capture.trace.outside_trace import untraced

APPROXIMATIONS = ("none", "tanh")


def is_candidate(module: nn.Module) -> bool:
    """Whether a module has the form of an activation that is not one of PyTorch's own."""
    if module._parameters or module._buffers or module._modules:
        return False
    if type(module).__module__.startswith("torch.") or "forward" in vars(module):
        return False
    taken = inspect.signature(module.forward).parameters.values()
    return len(taken) == 1 and next(iter(taken)).kind is inspect.Parameter.POSITIONAL_OR_KEYWORD


def recognise_gelu(module: nn.Module) -> str | None:
    """The `approximate` of the GELU that a module computes; None if it computes something else."""
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([-1e4, 1e4])]).double()
    try:
        actual = untraced(lambda: module.forward(x))
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None
    if not isinstance(actual, Tensor) or actual.shape != x.shape:
        return None
    for approximate in APPROXIMATIONS:
        if torch.allclose(actual, functional.gelu(x, approximate=approximate), rtol=0, atol=1e-9):
            return approximate
    return None


@contextmanager
def gelus_as_operators(model: nn.Module) -> Iterator[None]:
    """While open, every recognised activation of a model computes `aten.gelu`."""
    by_kind: dict[tuple[object, ...], str | None] = {}
    replaced: list[nn.Module] = []
    try:
        for module in model.modules():
            if not is_candidate(module):
                continue
            plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str)}
            key = (type(module), *sorted(plain.items()))
            if key not in by_kind:
                by_kind[key] = recognise_gelu(module)
            approximate = by_kind[key]
            if approximate is not None:
                vars(module)["forward"] = _Gelu(approximate)
                replaced.append(module)
        yield
    finally:
        for module in replaced:
            vars(module).pop("forward", None)


@dataclass
class _Gelu:
    approximate: str

    def __call__(self, x: Tensor) -> Tensor:
        return functional.gelu(x, approximate=self.approximate)
