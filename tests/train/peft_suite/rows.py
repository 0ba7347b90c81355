"""The rows of PEFT's `TEST_CASES` for Bone and MiSS, on one small captured net and under PEFT."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import bone_fx
from tests.train.peft_models import Net, in_peft, net, trains, x_of_net

KINDS = {"Bone": peft.BoneConfig, "MiSS": peft.MissConfig}
FIELDS: dict[str, dict[str, Any]] = {
    "1": {"target_modules": "lin0"},
    "2": {"target_modules": ["lin0"]},
    "3": {"target_modules": ["lin0", "lin1"]},
    "5": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
}
"""By the numbers in the names of PEFT's rows."""
IN_SHORT = {"Bone 5 bat", "MiSS 3"}
"""Rows of the default suite; the others prove the same on fewer layers."""


def rows(names: Any = None) -> Any:
    """A parametrization by the names of rows."""
    every = [
        " ".join(filter(None, words)) for words in itertools.product(KINDS, FIELDS, ("", "bat"))
    ]
    slow = pytest.mark.slow
    chosen = names or every
    marked = [n if n in IN_SHORT else pytest.param(n, marks=slow) for n in chosen]
    return pytest.mark.parametrize("row", marked)


def config(row: str, **changes: Any) -> Any:
    """PEFT's own configuration of a row."""
    kind, number, *init = row.split()
    fields = {"r": 2, "init_weights": init[0] if init else True, **FIELDS[number], **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Bone's end in PEFT 0.19
        return KINDS[kind](**fields)


@functools.cache
def _captured(dtype: torch.dtype) -> bone_fx.AdaptedModule:
    first = bone_fx.BoneConfig(r=2, target_modules=["lin0"])
    return bone_fx.adapt(net().to(dtype), first, (x_of_net().to(dtype),), adapter_name="first")


def ours(
    given: Any, name: str = "default", dtype: torch.dtype = torch.float32, **options: Any
) -> bone_fx.AdaptedModule:
    """The net under one adapter, as a copy of one capture."""
    adapted = copy.deepcopy(_captured(dtype))
    adapted.add_adapter(name, given, **options)
    adapted.set_adapter(name)
    adapted.delete_adapter("first")
    return adapted


def theirs(given: Any, name: str = "default", dtype: torch.dtype = torch.float32) -> Any:
    """The same under PEFT."""
    return in_peft(net().to(dtype), copy.deepcopy(given), adapter_name=name)


def pair(given: Any, name: str = "default") -> tuple[bone_fx.AdaptedModule, Any]:
    """One adapter here and under PEFT, with the same blocks, moved off zero."""
    mine, other = ours(given, name), theirs(given, name)
    moved(mine, name)
    give(other, mine, name)
    return mine, other


def moved(adapted: bone_fx.AdaptedModule, name: str = "default") -> None:
    """Write random values into the blocks of an adapter."""
    generator = torch.Generator().manual_seed(len(name))
    state = bone_fx.get_peft_model_state_dict(adapted, adapter_name=name)
    for key, value in state.items():
        if key.endswith("_block"):
            state[key] = 0.3 * torch.randn(value.shape, generator=generator)
    bone_fx.set_peft_model_state_dict(adapted, state, name)


def give(other: Any, mine: bone_fx.AdaptedModule, name: str = "default") -> None:
    """Give PEFT's adapter the values of ours."""
    state = bone_fx.get_peft_model_state_dict(mine, adapter_name=name)
    assert not peft.set_peft_model_state_dict(other, state, name).unexpected_keys


def states(mine: bone_fx.AdaptedModule, other: Any, name: str = "default") -> Any:
    """Both adapters' tensors by PEFT's names."""
    return (
        bone_fx.get_peft_model_state_dict(mine, adapter_name=name),
        peft.get_peft_model_state_dict(other, adapter_name=name),
    )


def trained(module: nn.Module, steps: int = 3) -> None:
    """Three steps of a classification, with dropout that draws the same numbers each time."""
    module.train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        scores = module(x_of_net())
        nn.functional.cross_entropy(scores, torch.arange(len(scores)) % 2).backward()
        optimizer.step()


def close(actual: Any, expected: Any, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def output(module: Any) -> Tensor:
    """Of the net in evaluation mode."""
    with torch.no_grad():
        result: Tensor = module.eval()(x_of_net())
    return result


def base() -> Net:
    return net().eval()  # type: ignore[return-value]


def training(module: nn.Module, name: str = "default") -> set[str]:
    """What trains, by the names that both have: PEFT's blocks of MiSS have another."""
    names = {entry.replace("miss_block", "bone_block") for entry in trains(module)}
    names = {entry for entry in names if "original_module" not in entry}  # see docs/peft.md
    return {entry.replace(f".modules_to_save.{name}", "") for entry in names}
