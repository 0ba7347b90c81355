"""Indices of a dimension put in another order, as a step of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.storage.boxes import Box


@dataclass(frozen=True, eq=False)
class Regrouped(Recipe):
    """One dimension in another order: its indices `[outer, inner, rest]` as `[inner, outer, rest]`.

    Gates before ups, in turns; queries, keys and values a head, all heads of each.
    """

    recipe: Recipe
    dim: int
    outer: int
    inner: int

    def __post_init__(self) -> None:
        if self.recipe.shape[self.dim] % (self.outer * self.inner):
            raise ValueError(
                f"dimension {self.dim} of {list(self.recipe.shape)} has no groups of "
                f"{self.outer} x {self.inner}"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.recipe.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipe.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        all_of_it = (0, self.shape[self.dim])
        source = self.recipe.part((*at[: self.dim], all_of_it, *at[self.dim + 1 :]))
        before, after = source.shape[: self.dim], source.shape[self.dim + 1 :]
        groups = source.view(*before, self.outer, self.inner, -1, *after)
        ordered = groups.transpose(self.dim, self.dim + 1).reshape(source.shape)
        start, stop = at[self.dim]
        out.copy_(ordered.narrow(self.dim, start, stop - start))

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return dim != self.dim and self.recipe.cuts(dim)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        groups = f"{self.outer} x {self.inner}"
        return f"{self.recipe.describe()} -> regroup {groups} of dim {self.dim}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.recipe,)
