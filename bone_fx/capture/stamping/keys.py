"""When two layers of a model compute the same: keys that are equal only if they do.

A key holds all that a layer's code can read: classes, attributes, names and shapes of parameters,
values of buffers, and the arguments of its call. What has no value to compare goes in by identity,
so that doubt makes keys differ. The number of the layer is left out; a `LayerNumber` in its place
tells whether anything but the cache looked at it.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
from collections.abc import Collection, Hashable, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import SymInt, Tensor, nn

from bone_fx.capture.stamping.layer_number import LayerNumber

Place = tuple[str, str]
"""Path of a module in its layer, and the name of one of its attributes."""

PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)


def numbers_of(layers: Sequence[nn.Module]) -> list[Place]:
    """The attributes that hold the number of the layer in every one of the layers."""
    tables = [
        {
            (path, name): value
            for path, module in layer.named_modules()
            for name, value in vars(module).items()
            if type(value) is int
        }
        for layer in layers
    ]
    return [
        place for place in tables[0] if all(table.get(place) == i for i, table in enumerate(tables))
    ]


def with_number(
    layer: nn.Module, places: Sequence[Place], number: LayerNumber
) -> AbstractContextManager[None]:
    """While open, the layer has a `LayerNumber` where it had its number."""

    @contextmanager
    def replaced() -> Any:
        owners = [(layer.get_submodule(path), name) for path, name in places]
        previous = [vars(owner)[name] for owner, name in owners]
        for owner, name in owners:
            vars(owner)[name] = number
        try:
            yield
        finally:
            for (owner, name), value in zip(owners, previous, strict=True):
                vars(owner)[name] = value

    return replaced()


def layer_key(layer: nn.Module, places: Collection[Place]) -> Hashable:
    """What a layer is, apart from its number and the values of its parameters.

    Args:
        layer: The layer.
        places: Where its number stands.
    """
    inside = {id(m): path for path, m in layer.named_modules()}
    tensors: dict[int, int] = {}
    parts: list[Hashable] = []
    for path, module in layer.named_modules(remove_duplicate=False):
        parts.append((path, inside[id(module)], type(module)))
        for name, parameter in module._parameters.items():
            same = tensors.setdefault(id(parameter), len(tensors))
            parts.append((name, same, parameter is not None and _form(parameter)))
        for name, buffer in module._buffers.items():
            parts.append((name, name in module._non_persistent_buffers_set))
            if buffer is not None:
                parts.append(_content(buffer))
        for name, value in sorted(vars(module).items()):
            if name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
                continue
            if (path, name) in places:
                value = LayerNumber
            elif "hook" in name and isinstance(value, dict):
                value = list(value.values())  # the keys of hooks only count them
            parts.append((name, value_key(value, inside)))
    return tuple(parts)


def value_key(value: object, inside: dict[int, str] | None = None) -> Hashable:
    """A value where it has one that can be compared, else the identity of the object."""
    inside = inside or {}
    if isinstance(value, PLAIN):
        return type(value), value if value == value else "nan"
    if type(value) in (list, tuple):
        return type(value), tuple(value_key(v, inside) for v in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return dict, tuple((value_key(k), value_key(v, inside)) for k, v in value.items())
    if isinstance(value, nn.Module) and id(value) in inside:
        return "module", inside[id(value)]
    if isinstance(value, FunctionType) and value.__closure__:
        cells = [cell.cell_contents for cell in value.__closure__]
        return value.__code__, value_key(value.__defaults__), value_key(cells, inside)
    if type(value) is partial:
        return partial, value_key([value.func, value.args, value.keywords], inside)
    if isinstance(value, MethodType):
        return "method", value_key(value.__func__), value_key(value.__self__, inside)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [getattr(value, f.name) for f in dataclasses.fields(value)]
        return type(value), value_key(fields, inside)
    return "object", id(value)


def sizes(tensor: Tensor) -> tuple[Hashable, ...]:
    """The shape, symbols as their expressions."""
    return tuple(s.node.expr if isinstance(s, SymInt) else s for s in tensor.shape)


def _form(tensor: Tensor) -> Hashable:
    return sizes(tensor), tensor.dtype, tensor.requires_grad


def _content(buffer: Tensor) -> Hashable:
    """Shape and value; by identity where there is no value to see."""
    if type(buffer) is not Tensor or buffer.device.type != "cpu":
        return id(buffer)
    flat = buffer.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return _form(buffer), flat


def is_alone(layer: nn.Module, uses: dict[int, int]) -> bool:
    """Whether the layer shares no parameter or buffer with another part of the model.

    Args:
        layer: The layer.
        uses: How many modules hold each tensor, by its id.
    """
    own: dict[int, int] = {}
    count_tensors(layer, own)
    return all(operator.eq(uses[key], number) for key, number in own.items())


def count_tensors(model: nn.Module, uses: dict[int, int]) -> None:
    """Counts the modules that hold each parameter and buffer, by its id."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                uses[id(tensor)] = uses.get(id(tensor), 0) + 1
