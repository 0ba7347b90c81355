"""Weights that are stacked in one constant, as experts are, taken apart and put together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.storage.boxes import Box


@dataclass(frozen=True, eq=False)
class Entry(Recipe):
    """One index of a constant's first dimension, without it."""

    recipe: Recipe
    number: int

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.recipe.shape[1:]

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipe.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        self.recipe.fill(out.unsqueeze(0), ((self.number, self.number + 1), *at))

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return self.recipe.cuts(dim + 1)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.recipe.describe()} -> number {self.number}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.recipe,)


@dataclass(frozen=True, eq=False)
class Stack(Recipe):
    """Recipes of one shape and dtype along a new first dimension."""

    recipes: tuple[Recipe, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return (len(self.recipes), *self.recipes[0].shape)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipes[0].dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        (start, stop), *rest = at
        for place, recipe in zip(out, self.recipes[start:stop], strict=True):
            recipe.fill(place, tuple(rest))

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return dim == 0 or all(recipe.cuts(dim - 1) for recipe in self.recipes)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"stack of {len(self.recipes)} of ({self.recipes[0].describe()})"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return self.recipes
