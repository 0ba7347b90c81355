"""Recipes of the quantized weights of experts: packed codes, scales and zero points by expert.

The three parts of an expert come from one float32 weight, as those of a product do
(`weights.recipes.quantized`). Whichever part is asked for first computes all of this expert; so one
expert's weight is in memory at a time, however many there are.

Shape letters: X experts, N outputs, K inputs, G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock

import torch
from torch import Tensor

from bone_fx.weights.recipes.nbits import QuantizedGroups, Scheme, pack, quantize
from bone_fx.weights.recipes.quantized import PartName, described
from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.recipes.scale_search import quantize_together
from bone_fx.weights.recipes.second_moments import SecondMoments
from bone_fx.weights.storage.boxes import Box, whole, within


@dataclass(eq=False)
class QuantizedExperts:
    """Weights `[X, N, K]` to be quantized.

    Attributes:
        source: The weights in float32.
        scheme: How.
        moments: Of the inputs of all experts on a text; None rounds to nearest.
    """

    source: Recipe
    scheme: Scheme
    moments: SecondMoments | None = None
    _waiting: dict[tuple[PartName, int], Tensor] = field(default_factory=dict, repr=False)
    _locks: tuple[Lock, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Where no expert can be had by itself, all are computed at once, by one thread.
        experts = self.source.shape[0]
        self._locks = tuple(Lock() for _ in range(experts)) if self._cuts else (Lock(),) * experts

    @property
    def _cuts(self) -> bool:
        return self.source.cuts(0)

    def part(self, name: PartName) -> ExpertsPart:
        """The recipe of one part of all experts."""
        return ExpertsPart(self, name)

    def take(self, name: PartName, expert: int) -> Tensor:
        """One part of an expert, computed with the others or left over from them."""
        with self._locks[expert]:
            if (name, expert) not in self._waiting:
                self._compute(expert)
            return self._waiting.pop((name, expert))

    def _compute(self, expert: int) -> None:
        experts, *rest = whole(self.source.shape)
        first, last = (expert, expert + 1) if self._cuts else experts
        for number, w_NK in enumerate(self.source.part(((first, last), *rest)), first):
            groups = (
                quantize(w_NK, self.scheme)
                if self.moments is None
                else quantize_together(w_NK, self.scheme, self.moments)
            )
            for name, content in self._packed(groups).items():
                self._waiting[name, number] = content

    def _packed(self, groups: QuantizedGroups) -> dict[PartName, Tensor]:
        bits = self.scheme.bits
        parts: dict[PartName, Tensor] = {
            "codes": pack(groups.codes, bits).flatten(1),
            "scales": groups.scales,
        }
        if not self.scheme.symmetric:
            parts["zero_points"] = pack(groups.zeros, bits)
        return parts


@dataclass(frozen=True, eq=False)
class ExpertsPart(Recipe):
    """Packed codes uint8 `[X, N, K * bits / 8]`, scales `[X, N, G]`, or packed zero points."""

    weights: QuantizedExperts
    name: PartName

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        experts, outputs, inputs = self.weights.source.shape
        scheme = self.weights.scheme
        groups = inputs // scheme.block_size
        if self.name == "codes":
            return experts, outputs, inputs * scheme.bits // 8
        return experts, outputs, groups if self.name == "scales" else -(-groups * scheme.bits // 8)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.weights.scheme.scale_dtype if self.name == "scales" else torch.uint8

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        (start, stop), *rows = at
        for expert in range(start, stop):
            content = self.weights.take(self.name, expert)
            out[expert - start].copy_(content[within(tuple(rows), whole(self.shape[1:]))])

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return dim == 0

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        weights = self.weights
        how = described(self.name, weights.scheme, calibrated=weights.moments is not None)
        return f"{weights.source.describe()} -> {how}, expert by expert"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.weights.source,)
