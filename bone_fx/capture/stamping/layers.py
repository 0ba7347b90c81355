"""Lists of layers in a model, and the marks that stand for equal ones in a trace.

The first layer of a kind runs as it is between two marks, `LayerEntry` and `LayerExit`; a later one
with an equal key (`stamping.keys`) is one node, `Layer`, until `lower.stamp` expands it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bone_fx.capture.stamping.keys import Place, count_tensors, is_alone, layer_key, numbers_of
from bone_fx.lower.stamp import DOMAIN

Call = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]
"""What runs in place of the forward of a layer, by its number."""


@dataclass(frozen=True)
class LayerList:
    """The layers of a model, in their order.

    Attributes:
        paths: Their paths.
        layers: The layers.
        places: Where each has its number.
        keys: What each is, apart from its number; without those that share tensors with others.
    """

    paths: list[str]
    layers: list[nn.Module]
    places: list[Place]
    keys: dict[int, Hashable]


def layer_lists(model: nn.Module, count: int | None = None) -> list[LayerList]:
    """The lists of layers in a model of which nothing is replaced yet, none inside another.

    Args:
        model: The model.
        count: How many layers a list has; None for any number above one.
    """
    uses: dict[int, int] = {}
    count_tensors(model, uses)
    lists: list[LayerList] = []
    inside: tuple[str, ...] = ()
    for path, modules in model.named_modules():
        if not isinstance(modules, nn.ModuleList) or path.startswith(inside):
            continue
        layers = list(modules)
        if len({id(layer) for layer in layers}) != (count or max(len(layers), 2)):
            continue
        places = numbers_of(layers)
        keys = {
            index: layer_key(layer, places)
            for index, layer in enumerate(layers)
            if "forward" not in vars(layer) and is_alone(layer, uses)
        }
        inside = (*inside, f"{path}.")
        lists.append(LayerList([f"{path}.{i}" for i in range(len(layers))], layers, places, keys))
    return lists


def hidden_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument, if it is a tensor that is given once."""
    first = next(iter((*args, *kwargs.values())), None)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    return first if sum(x is first for x in pytree.tree_leaves((args, kwargs))) == 1 else None


def mark(
    kind: str,
    tensors: tuple[Tensor, ...],
    path: str,
    like: Tensor | None = None,
    **more: int | str,
) -> Tensor:
    """A node of a trace that stands at or for a layer.

    Args:
        kind: `LayerEntry`, `LayerExit` or `Layer`.
        tensors: What it reads.
        path: The layer.
        like: What its result has the shape and dtype of; None for its first input.
        **more: Further attributes of the node.
    """
    like = tensors[0] if like is None else like
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        tensors,
        {"path": path, **more},
        dtype=like.dtype,
        shape=like.shape,
        version=1,
    )


@contextmanager
def forwards_replaced(calls: Sequence[tuple[LayerList, Call]]) -> Iterator[None]:
    """A context in which the layers of lists that have a key run by calls of ours."""
    replaced: list[nn.Module] = []
    try:
        for layers, call in calls:
            for index in layers.keys:
                vars(layers.layers[index])["forward"] = _forward(call, index)
                replaced.append(layers.layers[index])
        yield
    finally:
        for layer in replaced:
            vars(layer).pop("forward", None)


def _forward(call: Call, index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(index, args, kwargs)

    return forward
