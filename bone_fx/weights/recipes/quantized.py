"""Recipes of a quantized weight: its packed codes, its scales and its zero points.

The three parts come from one float32 weight, folded first and quantized last. Whichever part is
asked for first computes all; the others wait, packed, until they are asked for in turn, so that a
weight is folded and quantized once while a model is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from bone_fx.weights.recipes.fold_recipe import Fold
from bone_fx.weights.recipes.nbits import Scheme, pack, quantize
from bone_fx.weights.recipes.recipe import Cast, Concat, Recipe, Transpose, cast, without_cast
from bone_fx.weights.recipes.reorder import Regrouped
from bone_fx.weights.recipes.scale_search import quantize_together
from bone_fx.weights.recipes.second_moments import SecondMoments
from bone_fx.weights.storage.boxes import Box, bands, whole, within

PartName = Literal["codes", "scales", "zero_points"]
_BAND_BYTES = 16 << 20


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight `[N, K]` to be quantized.

    Attributes:
        source: The weight in float32.
        scheme: How.
        moments: Of the product's inputs on a text; None rounds to nearest.
    """

    source: Recipe
    scheme: Scheme
    moments: SecondMoments | None = None
    _waiting: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def part(self, name: PartName) -> Part:
        """The recipe of one part."""
        return Part(self, name)

    def take(self, name: PartName) -> Tensor:
        """One part, computed with the other two or left over from them."""
        with self._lock:
            if name not in self._waiting:
                self._waiting.update(self._quantized())
            return self._waiting.pop(name)

    def _quantized(self) -> dict[str, Tensor]:
        """The parts, computed a band of rows at a time."""
        bits = self.scheme.bits
        parts: dict[str, list[Tensor]] = {"codes": [], "scales": [], "zero_points": []}
        for band in bands(whole(self.source.shape), _BAND_BYTES, self.source.dtype.itemsize):
            rows = self.source.part(band)
            groups = (
                quantize(rows, self.scheme)
                if self.moments is None
                else quantize_together(rows, self.scheme, self.moments)
            )
            parts["codes"].append(pack(groups.codes, bits))
            parts["scales"].append(groups.scales)
            parts["zero_points"].append(pack(groups.zeros, bits))
        if self.scheme.symmetric:
            del parts["zero_points"]
        return {name: torch.cat(tensors) for name, tensors in parts.items()}


@dataclass(frozen=True, eq=False)
class Part(Recipe):
    """Packed codes uint8 `[N, G, B * bits / 8]`, scales `[N, G]`, or packed zero points uint8."""

    weight: QuantizedWeight
    name: PartName

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        outputs, inputs = self.weight.source.shape
        scheme = self.weight.scheme
        blocks = inputs // scheme.block_size
        if self.name == "codes":
            return outputs, blocks, scheme.block_size * scheme.bits // 8
        return outputs, blocks if self.name == "scales" else -(-blocks * scheme.bits // 8)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.weight.scheme.scale_dtype if self.name == "scales" else torch.uint8

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        out.copy_(self.evaluate()[within(at, whole(self.shape))])

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        return self.weight.take(self.name).contiguous()

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        how = described(self.name, self.weight.scheme, calibrated=self.weight.moments is not None)
        return f"{self.weight.source.describe()} -> {how}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.weight.source,)


def described(name: PartName, scheme: Scheme, *, calibrated: bool) -> str:
    """What a part of a quantized weight is, in a few words."""
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    how = f"{name} of int{scheme.bits} {kind}, blocks of {scheme.block_size}"
    return f"{how}, scales chosen for the inputs' second moments" if calibrated else how


def rows_in_float32(recipe: Recipe, *, transposed: bool) -> Recipe:
    """The recipe of a weight `[N, K]` in float32, with no rounding to a dtype of the graph.

    Args:
        recipe: A weight of the graph.
        transposed: Whether it is stored `[K, N]`.
    """
    unrounded = _unrounded(recipe)
    if not transposed:
        return unrounded
    if isinstance(unrounded, Transpose) and unrounded.permutation == (1, 0):
        return unrounded.recipe
    return Transpose(unrounded)


def behind_inputs(recipe: Recipe, inputs: int) -> Iterator[Recipe]:
    """The recipes that a product's weight is made of, down to where its inputs could be reordered.

    Through casts, transpositions, and weights packed or regrouped along the outputs.

    Args:
        recipe: A weight, a matrix.
        inputs: The dimension of its inputs, 0 or 1.
    """
    yield recipe
    if isinstance(recipe, Cast):
        yield from behind_inputs(recipe.recipe, inputs)
    elif isinstance(recipe, Transpose):
        yield from behind_inputs(recipe.recipe, recipe.permutation[inputs])
    elif isinstance(recipe, Concat | Regrouped) and recipe.dim != inputs:
        for source in recipe.inputs():
            yield from behind_inputs(source, inputs)


def _unrounded(recipe: Recipe) -> Recipe:
    recipe = without_cast(recipe)
    if isinstance(recipe, Fold):
        return replace(recipe, to=torch.float32)
    if isinstance(recipe, Transpose):
        return Transpose(_unrounded(recipe.recipe), recipe.permutation)
    if isinstance(recipe, Concat):
        return Concat(tuple(map(_unrounded, recipe.recipes)), recipe.dim)
    if isinstance(recipe, Regrouped):
        return replace(recipe, recipe=_unrounded(recipe.recipe))
    return cast(recipe, torch.float32)
