"""Where each constant lies in the external data file."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from bone_fx.onnx.recipe_tensor import RecipeTensor
from bone_fx.weights.recipes.recipe import Recipe, Value

EMBEDDED = 1024
"""Constants of at most this many bytes stay in model.onnx."""

_LARGE = 1 << 20
_PAGE, _CACHE_LINE = 4096, 64


@dataclass(frozen=True, eq=False)
class Placement:
    """One stored constant and the initializers that read it.

    Attributes:
        recipe: Where its bytes come from.
        values: The initializers; more than one if they share a recipe.
        offset: First byte in the data file: a multiple of 4096 for a constant of 1 MB or more, of
            64 otherwise.
        length: Number of bytes.
    """

    recipe: Recipe
    values: tuple[ir.Value, ...]
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length


def lay_out(initializers: Iterable[ir.Value]) -> list[Placement]:
    """Places every constant of more than `EMBEDDED` bytes, in the order of the source files.

    The layout depends on the recipes' sources and the initializers' names only, so it is the same
    for every run.
    """
    shared: dict[int, tuple[Recipe, list[ir.Value]]] = {}
    for value in initializers:
        if value.const_value is None or value.const_value.nbytes <= EMBEDDED:
            continue
        recipe = _recipe(value.const_value)
        shared.setdefault(id(recipe), (recipe, []))[1].append(value)
    ordered = sorted(shared.values(), key=lambda item: (item[0].order(), str(item[1][0].name)))
    placements: list[Placement] = []
    end = 0
    for recipe, values in ordered:
        length = math.prod(recipe.shape) * recipe.dtype.itemsize
        offset = aligned(end, length)
        placements.append(Placement(recipe, tuple(values), offset, length))
        end = offset + length
    return placements


def aligned(end: int, length: int) -> int:
    """The first byte for a constant of `length` bytes behind what ends at `end`."""
    alignment = _PAGE if length >= _LARGE else _CACHE_LINE
    return -(-end // alignment) * alignment


def external(placement: Placement, value: ir.Value, location: str) -> ir.ExternalTensor:
    """The reference to a placed constant that model.onnx holds."""
    return ir.ExternalTensor(
        location,
        placement.offset,
        placement.length,
        from_torch_dtype(placement.recipe.dtype),
        shape=ir.Shape(placement.recipe.shape),
        name=value.name or "",
    )


def _recipe(tensor: ir.TensorProtocol) -> Recipe:
    if isinstance(tensor, RecipeTensor):
        return tensor.recipe
    content = torch.from_numpy(tensor.numpy().copy())
    return Value(content.view(to_torch_dtype(tensor.dtype)), origin="constant of the graph")
