"""Steps of a recipe that put rows or other indices of a weight in another order."""

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


@dataclass(frozen=True, eq=False)
class Ungroup(Recipe):
    """Rows `[G, w1 + w2 + …]` of a weight in the order `[G, w1], [G, w2], …`.

    So q, k and v of each head become all of q, then all of k, then all of v.

    Attributes:
        recipe: The weight or bias; its first dimension has G · (w1 + w2 + …) rows.
        groups: G, the number of groups.
        widths: w1, w2, …, the rows of each part in a group.
    """

    recipe: Recipe
    groups: int
    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.recipe.shape[:1] != (self.groups * sum(self.widths),):
            raise ValueError(
                f"{self.groups} groups of {list(self.widths)} rows in {list(self.recipe.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.recipe.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipe.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        (wanted_start, wanted_stop), *rest = at
        if not self.recipe.cuts(0):  # a part of it costs as much as all of it
            order = row_order(self.groups, self.widths)[wanted_start:wanted_stop]
            out.copy_(self.recipe.part(((0, self.shape[0]), *rest))[order])
            return
        period, row, offset = sum(self.widths), 0, 0
        for width in self.widths:
            for group in range(self.groups):
                start, stop = max(wanted_start, row), min(wanted_stop, row + width)
                if start < stop:
                    first = group * period + offset + start - row
                    part = ((first, first + stop - start), *rest)
                    self.recipe.fill(out.narrow(0, start - wanted_start, stop - start), part)
                row += width
            offset += width

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return self.recipe.cuts(dim)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.recipe.describe()} -> {self.groups} groups of {list(self.widths)} apart"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.recipe,)


def row_order(groups: int, widths: tuple[int, ...]) -> Tensor:
    """For each row of the result the row of the source that it is."""
    rows = torch.arange(groups * sum(widths)).view(groups, -1)
    return torch.cat([part.reshape(-1) for part in torch.split(rows, list(widths), dim=1)])
