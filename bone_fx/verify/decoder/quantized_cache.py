"""A graph's cache in 8 bits, and a reference whose keys and values are rounded as the graph's.

Where a key lies between two codes, roundings in another order choose the one or the other, and the
logits differ by a step: neither graph nor reference is wrong. So the reference takes the codes that
the graph wrote. In halves a first token whose activations are massive may be off by more than a
step; the codes then tell nothing of its other activations, which are off too, and the reference
rounds that token by itself. A code further away than the tolerance is an error that is named. Every
token is held to the tolerance.

Shape letters: B batch, K key/value heads, S new tokens, T tokens of past and present, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor
from transformers import DynamicCache

from bone_fx.errors import LOOK, VerificationError
from bone_fx.verify.decoder.float_cache import float_cache
from bone_fx.verify.graph import WrittenGraph, tensor_of
from bone_fx.verify.parity import FP8_CACHE, INT8_CACHE

SIDES = ("key", "value")
_HALF = 0.501  # of a step, and what float32 leaves open
_PAST = "past_key_values."
_KEY, _FIRST_SCALE = 3, 12
"""Places of GroupQueryAttention's past keys and of the scale of keys."""

Layers = Mapping[int, tuple[Tensor, Tensor]]
"""Of keys and of values, by layer."""


@dataclass(frozen=True)
class Codes:
    """The numbers that a cache may hold.

    Attributes:
        name: `"int8"` or `"fp8"`.
        lowest: The smallest of them.
        highest: The largest.
        cost: How far they may take the logits from those of a cache in floats.
    """

    name: str
    lowest: float
    highest: float
    cost: float

    @property
    def figure(self) -> str:
        """Name of the figure that says what they cost."""
        return f"{self.name}_cache"

    def nearest(self, values: Tensor) -> Tensor:
        """The code that each value is rounded to, in float32; ties go to the even one."""
        inside = values.float().clamp(self.lowest, self.highest)
        return inside.round() if self.name == "int8" else inside.to(torch.float8_e4m3fn).float()

    def step(self, values: Tensor) -> Tensor:
        """How far the codes beside each value lie apart."""
        if self.name == "int8":
            return torch.ones_like(values)
        exponents = torch.frexp(values.abs().clamp_max(self.highest)).exponent - 1
        return torch.exp2(exponents.clamp_min(_LEAST_EXPONENT).float() - _BITS_BEHIND_THE_POINT)


INT8 = Codes("int8", -128, 127, INT8_CACHE)
FP8 = Codes("fp8", -448, 448, FP8_CACHE)
_LEAST_EXPONENT, _BITS_BEHIND_THE_POINT = -6, 3
"""Of float8_e4m3fn; below the exponent numbers are subnormal."""
_CODES = {ir.DataType.INT8: INT8, ir.DataType.FLOAT8E4M3FN: FP8}


@dataclass(frozen=True)
class QuantizedCache:
    """How a graph keeps its cache, and what it kept of one text.

    Attributes:
        numbers: The codes that a key or value may become.
        scales: What a step is worth, by layer, `[K, 1, D]`.
        constants: Names of the constants that say so.
        tolerance: How far a key or value may be from where it is rounded, relative to the largest
            of its layer.
        codes: What was kept of the text, `[K, T, D]`; nothing where the graph did not run it.
    """

    numbers: Codes
    scales: Layers
    constants: frozenset[str]
    tolerance: float
    codes: Layers

    @classmethod
    def of(cls, path: Path, tolerance: float = 0.0) -> QuantizedCache | None:
        """That of a graph; None if its cache is in floats."""
        inputs = onnx.load(path, load_external_data=False).graph.input
        if _CODES.keys().isdisjoint(v.type.tensor_type.elem_type for v in inputs):
            return None
        graph = ir.load(path).graph
        scales, names, numbers = {}, set(), INT8
        for node in graph:
            if node.op_type != "GroupQueryAttention" or len(node.inputs) <= _FIRST_SCALE:
                continue
            past, pair = node.inputs[_KEY], node.inputs[_FIRST_SCALE : _FIRST_SCALE + 2]
            if past is None or past.shape is None or past.dtype not in _CODES:
                continue
            numbers = _CODES[past.dtype]
            heads, size = (int(str(past.shape[axis])) for axis in (1, 3))
            key, value = (
                tensor_of(scale.const_value).reshape(heads, 1, size)
                for scale in pair
                if scale is not None and scale.const_value is not None
            )
            names |= {str(scale.name) for scale in pair if scale is not None}
            scales[int(str(past.name).split(".")[1])] = (key, value)
        return cls(numbers, scales, frozenset(names), tolerance, {}) if scales else None

    def with_codes(self, past: Mapping[str, Any], row: int, tokens: int) -> QuantizedCache:
        """The same with what was kept of a row of a batch, of its first tokens.

        Args:
            past: The cache by the names of a graph's inputs or outputs, `[B, K, T, D]`.
            row: The row.
            tokens: How many of its positions hold tokens.
        """
        codes: dict[int, list[Tensor]] = {}
        for layer in self.scales:
            for side in SIDES:
                names = (f"{_PAST}{layer}.{side}", f"present.{layer}.{side}")
                found = next((past[name] for name in names if name in past), None)
                if found is not None:
                    kept = torch.from_numpy(np.asarray(found)[row, :, :tokens].copy())
                    codes.setdefault(layer, []).append(kept)
        return replace(self, codes={k: (v[0], v[1]) for k, v in codes.items() if len(v) > 1})

    def cache(self, config: Any) -> RoundingCache:
        """A cache for one run of the reference, in which one text is one row."""
        return RoundingCache(config, self)

    def codes_of(self, layer: int, side: str, x: Tensor) -> Tensor:
        """What keys or values `[…, K, T, D]` are kept as, in float32."""
        return self.numbers.nearest(x / self.scales[layer][SIDES.index(side)])

    def floats(self, layer: int, side: str, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return codes.float() * self.scales[layer][SIDES.index(side)]

    def rounded(self, layer: int, side: str, x_KSD: Tensor, start: int) -> Tensor:
        """What a key or value is once it was kept, from some position on.

        Raises:
            VerificationError: The graph kept another.
        """
        if layer not in self.scales:
            return x_KSD
        place = SIDES.index(side)
        scale = self.scales[layer][place]
        places = (x_KSD / scale).clamp(self.numbers.lowest, self.numbers.highest)
        codes, steps = self.numbers.nearest(places), self.numbers.step(places)
        if layer in self.codes:
            kept = self.codes[layer][place][:, start : start + x_KSD.shape[1]].float()
            kept = torch.cat((kept, codes[:, kept.shape[1] :]), dim=1)
            allowed = _HALF * steps * scale + self.tolerance * x_KSD.abs().max()
            wrong = ((places - kept) * scale).abs() > allowed
            if bool(wrong.any()) or not bool(x_KSD.isfinite().all()):
                raise self._error(layer, side, x_KSD, kept * scale, wrong, start)
            # Of fp8 the steps around zero are finer than what 16 bits leave open.
            coarse = steps.clamp_min(self.numbers.highest / INT8.highest)
            alike = ((places - kept).abs() / coarse).amax((0, 2), keepdim=True) <= 1  # by token
            codes = torch.where(alike, kept, codes)
        return codes * scale

    def _error(
        self, layer: int, side: str, x: Tensor, kept: Tensor, wrong: Tensor, start: int
    ) -> VerificationError:
        head, token, channel = (int(i) for i in wrong.nonzero()[0]) if wrong.any() else (0, 0, 0)
        return VerificationError(
            f"verification failed: layer {layer}: the cache holds another {side} of token"
            f" {start + token} (head {head}, channel {channel})",
            expected=f"{float(x[head, token, channel]):.4g}, rounded to 8 bits",
            found=f"{float(kept[head, token, channel]):.4g}",
            next_step=LOOK,
        )


def runnable(path: Path, provider: str) -> WrittenGraph:
    """A decoder's graph, or the twin of one with a cache in fp8: the CPU provider runs no other."""
    kept = QuantizedCache.of(path)
    twin = kept is not None and kept.numbers is FP8
    return WrittenGraph(path, provider, (float_cache,) if twin else ())


class RoundingCache(DynamicCache):
    """Keeps keys and values as a graph does, of one row; what is given back is rounded too."""

    def __init__(self, config: Any, kept: QuantizedCache) -> None:
        super().__init__(config=config)
        self._kept = kept
        self._seen: dict[int, int] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Past and new keys and values `[1, K, T, D]`, the new ones rounded."""
        start = self._seen.get(layer_idx, 0)
        self._seen[layer_idx] = start + key_states.shape[2]
        pair = []
        for side, states in zip(SIDES, (key_states, value_states), strict=True):
            rounded = self._kept.rounded(layer_idx, side, states[0].float(), start)
            pair.append(rounded[None].to(states.dtype))
        return super().update(pair[0], pair[1], layer_idx, *args, **kwargs)


def rows_of_codes(
    kept: QuantizedCache | None, past: Mapping[str, Any], tokens: Sequence[int]
) -> list[QuantizedCache | None]:
    """What a graph kept of each row of a batch; None for each of a cache in floats."""
    return [
        None if kept is None else kept.with_codes(past, row, count)
        for row, count in enumerate(tokens)
    ]
