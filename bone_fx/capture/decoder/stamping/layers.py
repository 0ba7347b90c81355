"""Layers that are equal are traced once; each later one is a single node until `stamp` expands it.

The first layer of a kind runs as it is between two marks, `LayerEntry(hidden, past key, past
value)` and `LayerExit(hidden, present key, present value)`. A later layer with an equal key
(`keys`) becomes `Layer(hidden)`, to which `spread_pasts` gives pasts and presents. A layer
that does more than turn one tensor into another through one attention is always traced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bone_fx.capture.decoder.attention_emitter import AttentionEmitter
from bone_fx.capture.decoder.kv_cache import LayerNumber
from bone_fx.capture.decoder.stamping.keys import (
    Place,
    count_tensors,
    is_alone,
    layer_key,
    numbers_of,
    sizes,
    value_key,
    with_number,
)
from bone_fx.lower.stamp import DOMAIN, ENTRY, EXIT, LAYER


@dataclass
class _Traced:
    """A traced layer that later ones may repeat; `kept` keeps alive what its key names by id."""

    number: int
    output: Any
    kept: object


class _Stamper:
    """Stands before the forward of each layer of one list."""

    def __init__(
        self, paths: list[str], layers: list[nn.Module], emitter: Callable[[], AttentionEmitter]
    ) -> None:
        self.paths = paths
        self.layers = layers
        self.places: list[Place] = numbers_of(layers)
        self.emitter = emitter
        self.keys: dict[int, Hashable] = {}
        self._traced: dict[Hashable, _Traced] = {}
        self._last_emitter: AttentionEmitter | None = None

    def call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer, or one node in its place."""
        layer, emitter = self.layers[index], self.emitter()
        run = type(layer).forward
        if emitter is not self._last_emitter:  # another forward of the same model
            self._last_emitter = emitter
            self._traced.clear()
        hidden = _hidden(args, kwargs)
        if hidden is None or index not in self.keys:
            return run(layer, *args, **kwargs)
        alike = emitter.cache.pasts.like(index)
        others = pytree.tree_map(lambda x: None if x is hidden else x, (args, kwargs))
        key = (
            self.keys[index],
            value_key(others),
            *((sizes(t), t.dtype) for t in (hidden, *alike)),
        )
        traced = self._traced.get(key)
        if traced is not None:
            return self._stamped(traced, index, hidden)
        entered = _mark(ENTRY, (hidden, *emitter.cache.pasts.of_layer(index)), self.paths[index])
        args, kwargs = pytree.tree_map(lambda x: entered if x is hidden else x, (args, kwargs))
        number = LayerNumber(index)
        before = len(emitter.layers)
        presents = set(emitter.cache.presents)
        with with_number(layer, self.places, number):
            output = run(layer, *args, **kwargs)
        leaves, _ = pytree.tree_flatten(output)
        tensors = [leaf for leaf in leaves if leaf is not None]
        one = len(tensors) == 1 and isinstance(tensors[0], Tensor)
        attended = [facts.layer for facts in emitter.layers[before:]] == [index]
        if (
            number.read
            or not one
            or not attended
            or set(emitter.cache.presents) - presents != {index}
        ):
            return output
        left = _mark(EXIT, (tensors[0], *emitter.cache.presents[index]), self.paths[index])
        output = pytree.tree_map(lambda x: left if x is tensors[0] else x, output)
        self._traced[key] = _Traced(index, output, (others, hidden))
        return output

    def _stamped(self, traced: _Traced, index: int, hidden: Tensor) -> Any:
        emitter = self.emitter()
        former = next(t for t in pytree.tree_leaves(traced.output) if t is not None)
        output = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{LAYER}",
            (hidden,),
            {"of": self.paths[traced.number], "path": self.paths[index], "layer": index},
            dtype=former.dtype,
            shape=former.shape,
            version=1,
        )
        emitter.cache.refuse_waiting()
        emitter.cache.stamped.add(index)
        facts = next(f for f in emitter.layers if f.layer == traced.number)
        emitter.layers.append(replace(facts, layer=index))
        return pytree.tree_map(lambda x: output if x is former else x, traced.output)


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first argument, if it is a tensor that is given once."""
    first = next(iter((*args, *kwargs.values())), None)
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    return first if sum(x is first for x in pytree.tree_leaves((args, kwargs))) == 1 else None


def _mark(kind: str, tensors: tuple[Tensor, ...], path: str) -> Tensor:
    hidden = tensors[0]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        tensors,
        {"path": path},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )


@contextmanager
def equal_layers_once(
    model: nn.Module, count: int, emitter: Callable[[], AttentionEmitter], computed: set[str]
) -> Iterator[None]:
    """While open, the model's equal layers are traced once.

    Args:
        model: The model, its norms already replaced.
        count: Number of layers of the cache; only lists of that length are looked at.
        emitter: Gives the emitter of the current forward when a layer is called.
        computed: Names in their modules of buffers that have no value of their own.
    """
    uses: dict[int, int] = {}
    count_tensors(model, uses)
    wrapped: list[nn.Module] = []
    try:
        for path, modules in model.named_modules():
            if not isinstance(modules, nn.ModuleList) or len(modules) != count:
                continue
            layers = list(modules)
            if len({id(layer) for layer in layers}) != count:
                continue
            stamper = _Stamper([f"{path}.{i}" for i in range(count)], layers, emitter)
            for index, layer in enumerate(layers):
                if "forward" not in vars(layer) and is_alone(layer, uses):
                    stamper.keys[index] = layer_key(layer, stamper.places, computed)
            for index in stamper.keys:
                vars(layers[index])["forward"] = _forward(stamper, index)
                wrapped.append(layers[index])
        yield
    finally:
        for layer in wrapped:
            vars(layer).pop("forward", None)


def _forward(stamper: _Stamper, index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return stamper.call(index, args, kwargs)

    return forward
