"""Long texts, on a graph cut behind its first layers.

What a window, a chunk or a table of positions does wrong shows beyond its length only, where the
whole model would take minutes. Layers are alike: the first ones, one of every kind, meet the long
text, and the torch model runs as many. A past that no token made stands for what would come before:
some of its values are loud, at the ends of the windows, so that one position more or less is seen.
A graph with a cache in 8 bits is given its codes, and the reference what they stand for.

Shape letters: B batch, S tokens, H hidden, N heads of the cache, P positions of the past, D head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError, first_line
from bone_fx.verify.cases import LONGEST, edges, vocabulary_of
from bone_fx.verify.decoder.layers import LayerList, check_alike, layer_outputs
from bone_fx.verify.decoder.quantized_cache import QuantizedCache, rows_of_codes
from bone_fx.verify.decoder.routes import Choices, Routed, Routes
from bone_fx.verify.decoder.running import NUMPY_DTYPES
from bone_fx.verify.graph import Edit, WrittenGraph, cut_at
from bone_fx.verify.locate import first_difference, located
from bone_fx.verify.parity import Parity, difference

if TYPE_CHECKING:
    import onnxruntime

PAIR = "long_texts"
_CACHE_BYTES = 1 << 30
"""The largest past that is made up, of all layers that are run, in float32."""
_NEW = 3
_SHORT_PAST = 5
_ALIKE = 0.05
"""Of the largest value: two values are the same up to roundings to 16 bits."""
_LOUD = 8
"""A loud value of the past is its length over this many times larger than the others."""

Past = list[tuple[Tensor, Tensor]]


def verify_long_texts(
    parity: Parity,
    graph: WrittenGraph,
    edits: Sequence[Edit],
    model: nn.Module,
    context_length: int | None,
    cache: QuantizedCache | None = None,
) -> None:
    """Compare the first layers of a graph with torch's beyond every length the model names.

    Args:
        parity: Takes the figures.
        graph: The graph.
        edits: Edits that make it comparable.
        model: The reference, with the weights that the graph has.
        context_length: Positions that the graph holds for.
        cache: How the graph keeps its cache in 8 bits; None for floats.

    Raises:
        VerificationError: They differ.
    """
    config: Any = model.config
    lengths = edges(config, context_length)
    layers = LayerList.of(model)
    if layers is not None:
        check_alike(graph.read().graph, layers, config.get_text_config())
    try:
        first = _FirstLayers.of(graph, edits, model, cache)
    except _CutError as reason:
        parity.skip("long texts", str(reason))
        return
    vocabulary = vocabulary_of(model)
    for length in lengths:
        tokens = length + _NEW
        if tokens <= min(LONGEST, context_length or LONGEST):
            name = f"{first.count} layers, a text of {tokens} tokens, beyond {length}"
            ids = _ids(vocabulary, tokens)
            first.compare(parity, name, ids)
    if why_not := first.why_no_past():
        parity.skip("a made-up past", why_not)
        return
    longest = min(first.most_positions(), (context_length or LONGEST) - _NEW)
    for positions in sorted({*(n + 1 for n in lengths if n + 1 < longest), longest}):
        name = f"{first.count} layers, {_NEW} tokens after a past of {positions}"
        first.compare(parity, name, _ids(vocabulary, _NEW), first.past(positions, lengths))
    for padding in (n + 1 for n in lengths if n + 1 < longest - _SHORT_PAST):
        name = f"{first.count} layers, {_NEW} tokens after a past of {_SHORT_PAST}, padded"
        past = first.past(_SHORT_PAST, ())
        first.compare(parity, f"{name} by {padding}", _ids(vocabulary, _NEW), past, padding)


@dataclass(frozen=True)
class _FirstLayers:
    """The first layers of a graph and of the reference.

    Attributes:
        graph: The graph.
        edits: Edits that make it comparable, and cut it behind them.
        choices: The nodes of the graph so edited that choose experts.
        session: The graph so edited, with what these choose.
        parts: Names of the values whose sum leaves the last of them.
        model: The reference.
        layers: The list of its layers.
        count: How many are run.
        hidden: H.
        cache: How the graph keeps its cache in 8 bits; None for floats.
    """

    graph: WrittenGraph
    edits: tuple[Edit, ...]
    choices: Choices
    session: onnxruntime.InferenceSession
    parts: tuple[str, ...]
    model: nn.Module
    layers: LayerList
    count: int
    hidden: int
    cache: QuantizedCache | None

    @classmethod
    def of(
        cls,
        graph: WrittenGraph,
        edits: Sequence[Edit],
        model: nn.Module,
        cache: QuantizedCache | None,
    ) -> _FirstLayers:
        """As many layers as hold one of every kind.

        The cut is tried on a short text: the parts are those whose sum is the reference's.

        Raises:
            _CutError: The graph cannot be cut there.
        """
        whole: Any = model.config
        config = whole.get_text_config()
        layers = LayerList.of(model)
        if layers is None:
            raise _CutError("the reference has no list of its layers")
        count = layers.distinct(config)
        outputs = layer_outputs(graph.read().graph, layers.path).get(count - 1, [])
        if not outputs:
            raise _CutError(f"nothing in the graph leaves layer {count - 1}")
        edits = (*edits, cut_at(outputs))
        choices = Choices.of(graph, edits)
        edits = (*edits, *choices.edits)
        session, hidden = graph.session(*edits), int(config.hidden_size)
        all_parts = cls(graph, edits, choices, session, (), model, layers, count, hidden, cache)
        leaving, routes, kept = all_parts.values(_SHORT_IDS)
        expected = all_parts.expected(_SHORT_IDS, None, routes, kept)
        smallest = math.inf
        for size in range(len(leaving), 0, -1):
            for parts in combinations(leaving, size):
                whole = torch.stack([leaving[name] for name in parts]).sum(0)
                smallest = min(smallest, gap := difference(whole, expected))
                if gap <= _ALIKE:
                    return replace(all_parts, parts=parts)
        raise _CutError(
            f"what leaves layer {count - 1} of the graph differs {_by(smallest)} from the"
            " reference's on a short text"
        )

    def why_no_past(self) -> str:
        """Why no past is made up, tried on a short one; empty if it can be."""
        past = self.past(len(_SHORT_IDS[0]), ())
        actual, routes, kept = self.run(_SHORT_IDS, past)
        try:
            expected = self.expected(_SHORT_IDS, past, routes, kept)
        except RuntimeError as error:
            # A window of one token: transformers' cache keeps all of them.
            return f"the reference does not run after a short one: {first_line(error)}"
        gap = difference(actual, expected)
        return "" if gap <= _ALIKE else f"after a short one the graph differs {_by(gap)}"

    def compare(
        self, parity: Parity, case: str, ids: Tensor, past: Past | None = None, padding: int = 0
    ) -> None:
        """Compare what leaves the last layer of both; an error names the first that differs.

        The graph's past has so many slots of padding behind it, as a short text has in a batch.
        """
        actual, routes, kept = self.run(ids, past, padding)

        def expected() -> Tensor:
            with Routed(self.model, ids.numel(), routes, parity.tolerance, case):
                return self.expected(ids, past, kept=kept)

        try:
            parity.compare(PAIR, case, actual, expected())
        except VerificationError as error:
            where = first_difference(
                self.graph,
                self.edits,
                self.model,
                lambda session: session.run(None, self._feeds(session, ids, past, padding)),
                expected,
                parity.tolerance,
            )
            raise located(error, where) from None

    def run(
        self, ids: Tensor, past: Past | None = None, padding: int = 0
    ) -> tuple[Tensor, Routes, QuantizedCache | None]:
        """What leaves the last layer of the graph, `[B, S, H]`, its experts, and what it kept."""
        values, routes, kept = self.values(ids, past, padding)
        return torch.stack([values[name] for name in self.parts]).sum(0), routes, kept

    def values(
        self, ids: Tensor, past: Past | None = None, padding: int = 0
    ) -> tuple[dict[str, Tensor], Routes, QuantizedCache | None]:
        """The values `[B, S, H]` that later layers read, by name; experts chosen; what is kept."""
        names = [value.name for value in self.session.get_outputs()]
        arrays = self.session.run(names, self._feeds(self.session, ids, past, padding))
        outputs = dict(zip(names, arrays, strict=True))
        chosen = self.choices.read(outputs, (1, ids.numel()))
        values = {
            name: torch.from_numpy(value).float().reshape(*ids.shape, -1)
            for name, value in outputs.items()
            if value.dtype.kind == "f"
            and value.shape[-1:] == (self.hidden,)
            and value.size == ids.numel() * self.hidden
            and name not in self.choices.taken
        }
        tokens = ids.numel() + (0 if past is None else past[0][0].shape[2])
        [kept] = rows_of_codes(self.cache, outputs, [tokens])
        return values, [each[0] for each in chosen], kept

    def expected(
        self,
        ids: Tensor,
        past: Past | None = None,
        routes: Sequence[Tensor] = (),
        kept: QuantizedCache | None = None,
    ) -> Tensor:
        """What leaves the same layer of the reference, `[B, S, H]`, whose experts are given."""
        length = 0 if past is None else past[0][0].shape[2]
        mask = torch.ones(len(ids), length + ids.shape[1], dtype=torch.long)
        with Routed(self.model, ids.numel(), routes):
            return self._reference(ids, mask, self._cache(past, kept))

    def most_positions(self) -> int:
        """Positions of the longest past within the bound on its bytes."""
        whole: Any = self.model.config
        config = whole.get_text_config()
        [key, _], *_ = self._short_cache()
        heads = max(key.shape[1], int(getattr(config, "num_attention_heads", None) or 1))
        a_position = 2 * self.count * heads * key.shape[3] * 4
        return _CACHE_BYTES // a_position

    def past(self, positions: int, lengths: Sequence[int]) -> Past:
        """Keys and values `[B, N, P, D]` of each layer that no token made."""
        generator = torch.Generator().manual_seed(positions)
        loud = {0, positions - 1}
        for length in lengths:
            loud |= {positions + new - length for new in range(-1, _NEW + 1)}
        rows = [row for row in loud if 0 <= row < positions]
        past: Past = []
        for key, value in self._short_cache():
            shape = (1, key.shape[1], positions, key.shape[3])
            keys = torch.randn(shape, generator=generator)
            values = torch.randn((*shape[:3], value.shape[3]), generator=generator)
            values[:, :, rows] *= max(1.0, positions / _LOUD)
            past.append(self._as_kept(len(past), keys, values))
        return past

    def _as_kept(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[1, N, P, D]` that a cache in 8 bits can hold, the loudest too."""
        if self.cache is None:
            return keys, values
        loudest = values.abs().max() / self.cache.numbers.highest
        as_codes = values / loudest * self.cache.scales[layer][1]
        return (
            self.cache.floats(layer, "key", self.cache.codes_of(layer, "key", keys)),
            self.cache.floats(layer, "value", self.cache.codes_of(layer, "value", as_codes)),
        )

    def _feeds(
        self, session: onnxruntime.InferenceSession, ids: Tensor, past: Past | None, padding: int
    ) -> dict[str, Any]:
        length = 0 if past is None else past[0][0].shape[2]
        mask = np.ones((len(ids), length + padding + ids.shape[1]), dtype=np.int64)
        mask[:, length : length + padding] = 0
        feeds: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": mask}
        inputs = {value.name: value for value in session.get_inputs()}
        for name, value in inputs.items():
            if name.startswith("past_key_values."):
                _, number, side = name.split(".")
                cached = _cached(past, int(number), side, value.shape)
                cached = nn.functional.pad(cached, (0, 0, 0, padding), value=1.0)
                if self.cache is not None:
                    cached = self.cache.codes_of(int(number), side, cached)
                feeds[name] = cached.numpy().astype(NUMPY_DTYPES[value.type])
        return {name: array for name, array in feeds.items() if name in inputs}

    def _short_cache(self) -> Past:
        """The reference's own cache of a short text."""
        cache = self._cache(None, None)
        self._reference(_SHORT_IDS, torch.ones_like(_SHORT_IDS), cache)
        return [(layer.keys, layer.values) for layer in cache.layers[: self.count]]

    def _cache(self, past: Past | None, kept: QuantizedCache | None) -> Any:
        from transformers import DynamicCache

        config: Any = self.model.config
        cache = DynamicCache(config=config) if kept is None else kept.cache(config)
        for number, (key, value) in enumerate(past or ()):
            cache.update(key.clone(), value.clone(), number)
        return cache

    def _reference(self, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        outputs: list[Tensor] = []

        def keep(_: nn.Module, args: Any, output: Any) -> None:
            del args
            outputs.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        with torch.no_grad(), _only(self.model, self.layers, self.count):
            handle = self.layers.layers[self.count - 1].register_forward_hook(keep)
            try:
                self.model(
                    input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
                )
            except _Reached:
                pass
            finally:
                handle.remove()
        return outputs[0].float().reshape(*ids.shape, -1)


class _CutError(Exception):
    """Why a graph is not run behind its first layers alone."""


class _Reached(Exception):  # noqa: N818 - no error: what comes behind is of no use
    pass


_SHORT_IDS = torch.tensor([[5, 3, 8, 2, 9, 4]])


@contextmanager
def _only(model: nn.Module, layers: LayerList, count: int) -> Iterator[None]:
    """A context in which a model has its first layers only."""
    owner, _, name = layers.path.rpartition(".")
    setattr(model.get_submodule(owner), name, nn.ModuleList(list(layers.layers)[:count]))
    try:
        yield
    finally:
        setattr(model.get_submodule(owner), name, layers.layers)


def _cached(past: Past | None, number: int, side: str, shape: Sequence[Any]) -> Tensor:
    """One input of the cache; a graph that keeps a key for every query head gets copies.

    Of a layer behind the cut nothing but the size may be read.
    """
    if past is None or number >= len(past):
        return torch.zeros(1, shape[1], 0 if past is None else past[0][0].shape[2], shape[3])
    tensor = past[number][side == "value"]
    return tensor.repeat_interleave(shape[1] // tensor.shape[1], dim=1)


def _ids(vocabulary: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, vocabulary, (1, tokens), generator=generator)


def _by(gap: float) -> str:
    return "(shape, NaN or Inf)" if math.isinf(gap) else f"by {gap:.2g} of the largest value"
