"""Equal layers of a decoder are traced once; a later one is a single node until it is expanded.

The marks of `stamping.layers` have a layer's past and present: `LayerEntry(hidden, past key, past
value)` and `LayerExit(hidden, present key, present value)`; to `Layer(hidden)` gives `spread_pasts`
pasts and presents. A layer that does more than turn one tensor into another through one attention
is always traced.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from bone_fx.capture.decoder.attention_emitter import AttentionEmitter
from bone_fx.capture.stamping.keys import sizes, value_key, with_number
from bone_fx.capture.stamping.layer_number import LayerNumber
from bone_fx.capture.stamping.layers import LayerList, forwards_replaced, hidden_argument, mark
from bone_fx.lower.stamp import ENTRY, EXIT, LAYER


@dataclass
class _Traced:
    """A traced layer that later ones may repeat; `kept` keeps alive what its key names by id."""

    number: int
    output: Any
    kept: object


class _Stamper:
    """Stands before the forward of each layer of one list.

    Args:
        of: The list.
        emitter: Gives the emitter of the current forward.
        traced: Whether there is a graph to mark layers in.
    """

    def __init__(
        self, of: LayerList, emitter: Callable[[], AttentionEmitter], *, traced: bool
    ) -> None:
        self.paths, self.layers = of.paths, of.layers
        self.places, self.keys = of.places, of.keys
        self.emitter = emitter
        self._mark = mark if traced else _no_mark
        self._traced: dict[Hashable, _Traced] = {}
        self._last_emitter: AttentionEmitter | None = None

    def call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer, or one node in its place."""
        layer, emitter = self.layers[index], self.emitter()
        run = type(layer).forward
        if emitter is not self._last_emitter:  # another forward of the same model
            self._last_emitter = emitter
            self._traced.clear()
        hidden = hidden_argument(args, kwargs)
        if hidden is None:
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
        entered = self._mark(
            ENTRY, (hidden, *emitter.cache.pasts.of_layer(index)), self.paths[index]
        )
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
        left = self._mark(EXIT, (tensors[0], *emitter.cache.presents[index]), self.paths[index])
        output = pytree.tree_map(lambda x: left if x is tensors[0] else x, output)
        self._traced[key] = _Traced(index, output, (others, hidden))
        return output

    def _stamped(self, traced: _Traced, index: int, hidden: Tensor) -> Any:
        emitter = self.emitter()
        former = next(t for t in pytree.tree_leaves(traced.output) if t is not None)
        of = self.paths[traced.number]
        output = self._mark(LAYER, (hidden,), self.paths[index], like=former, of=of, layer=index)
        emitter.cache.refuse_waiting()
        emitter.cache.stamped.add(index)
        facts = next(f for f in emitter.layers if f.layer == traced.number)
        emitter.layers.append(replace(facts, layer=index))
        return pytree.tree_map(lambda x: output if x is former else x, traced.output)


def _no_mark(
    _kind: str, tensors: tuple[Tensor, ...], _path: str, like: Tensor | None = None, **_: int | str
) -> Tensor:
    return tensors[0] if like is None else like


def equal_layers_once(
    lists: Sequence[LayerList], emitter: Callable[[], AttentionEmitter], *, traced: bool
) -> AbstractContextManager[None]:
    """While open, equal layers run once.

    Args:
        lists: Those of the model.
        emitter: Gives the emitter of the current forward when a layer is called.
        traced: Whether the model is traced, so that each layer leaves marks.
    """
    return forwards_replaced(
        [(layers, _Stamper(layers, emitter, traced=traced).call) for layers in lists]
    )
