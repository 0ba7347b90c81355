"""A table with rows in the place of some of its own: embeddings of tokens that were trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.storage.boxes import Box


@dataclass(frozen=True, eq=False)
class ReplacedRows(Recipe):
    """A table, some of whose rows are others.

    Attributes:
        recipe: The table `[V, D]`.
        numbers: The rows that are replaced.
        rows: What comes in their place, `[len(numbers), D]`, in the table's dtype.
    """

    recipe: Recipe
    numbers: tuple[int, ...]
    rows: Tensor

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.recipe.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipe.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        self.recipe.fill(out, at)
        (start, stop), columns = at
        for number, row in zip(self.numbers, self.rows, strict=True):
            if start <= number < stop:
                out[number - start].copy_(row[slice(*columns)])

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return self.recipe.cuts(dim)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.recipe.describe()} -> replace {len(self.numbers)} rows"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.recipe,)
