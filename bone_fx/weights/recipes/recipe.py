"""Recipes: where a constant's bytes come from and what is done to them.

A recipe knows its shape and dtype at once and gives its tensor, or any part of it, when asked.
`fold` is constant propagation over recipes: it wraps the base's recipe in a `Fold`. Two names that
share one weight share one recipe object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bone_fx.errors import BaseModelError
from bone_fx.weights.storage.boxes import Box, bands, sizes, whole, within
from bone_fx.weights.storage.safetensors_file import TensorEntry, read_part
from bone_fx.weights.storage.scratch import contiguous, scratch

Order = tuple[int, str, int]
_WITHOUT_FILE: Order = (1, "", 0)

BAND_BYTES = 2 << 20
"""What a step works on at a time: little enough for a core's caches, enough for long vectors."""

_SHOWN = 3
"""Recipes of a concatenation that a description spells out; q, k and v are as many."""


class CastOverflowError(Exception):
    """A finite value is beyond the largest of a dtype; who knows the constant's name says which."""


class Recipe(ABC):
    """A constant that is not there yet."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the result."""

    @abstractmethod
    def fill(self, out: Tensor, at: Box) -> None:
        """Compute a part of the constant.

        Args:
            out: Where it goes: of the part's shape and the constant's dtype, with any strides.
            at: The part.
        """

    def cuts(self, dim: int) -> bool:
        """Whether a part of some indices of a dimension costs no more than its share."""
        del dim
        return False

    def part(self, at: Box) -> Tensor:
        """A part of the constant, contiguous."""
        out = torch.empty(sizes(at), dtype=self.dtype)
        self.fill(out, at)
        return out

    def evaluate(self) -> Tensor:
        """The constant: on the CPU, contiguous, of `shape` and `dtype`; computed at every call."""
        return self.part(whole(self.shape))

    @abstractmethod
    def describe(self) -> str:
        """One line: where the bytes come from, then each step after an arrow."""

    def inputs(self) -> tuple[Recipe, ...]:
        """The recipes this one is made of."""
        return ()

    def order(self) -> Order:
        """A key to sort by, so that files are read from front to back."""
        return min((recipe.order() for recipe in self.inputs()), default=_WITHOUT_FILE)

    def reads(self) -> Iterator[Read]:
        """Every read from a file that evaluation makes."""
        for recipe in self.inputs():
            yield from recipe.reads()


@dataclass(frozen=True, eq=False)
class Read(Recipe):
    """A tensor as it lies in a safetensors file."""

    path: Path
    key: str
    entry: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.entry.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.entry.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        whole_or_bands = [at] if out.is_contiguous() else bands(at, BAND_BYTES, self.dtype.itemsize)
        for band in whole_or_bands:
            with contiguous(out[within(band, at)]) as values:
                read_part(self.path, self.entry, band, values)

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return True

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"read {self.path.name}:{self.key}"

    def order(self) -> Order:  # noqa: D102 - documented on Recipe
        return (0, str(self.path), self.entry.offset)

    def reads(self) -> Iterator[Read]:  # noqa: D102 - documented on Recipe
        yield self


@dataclass(frozen=True, eq=False)
class Value(Recipe):
    """A tensor that is in memory already: a computed buffer, or a head from an adapter."""

    tensor: Tensor
    origin: str = "value"

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.tensor.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        out.copy_(self.tensor.detach()[within(at, whole(self.shape))])

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return True

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.origin} {dtype_name(self.dtype)}{list(self.shape)}"


@dataclass(frozen=True, eq=False)
class Transpose(Recipe):
    """Dimensions permuted; without `permutation`, a matrix transposed."""

    recipe: Recipe
    permutation: tuple[int, ...] = (1, 0)

    def __post_init__(self) -> None:
        if sorted(self.permutation) != list(range(len(self.recipe.shape))):
            raise ValueError(
                f"{self.permutation} does not permute the dimensions of {list(self.recipe.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return tuple(self.recipe.shape[dim] for dim in self.permutation)

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipe.dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        back = [self.permutation.index(dim) for dim in range(len(at))]
        self.recipe.fill(out.permute(back), tuple(at[dim] for dim in back))

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return self.recipe.cuts(self.permutation[dim])

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        step = "transpose" if self.permutation == (1, 0) else f"permute {list(self.permutation)}"
        return f"{self.recipe.describe()} -> {step}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.recipe,)


@dataclass(frozen=True, eq=False)
class Cast(Recipe):
    """Rounded to another dtype."""

    recipe: Recipe
    to: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.recipe.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.to

    def fill(self, out: Tensor, at: Box) -> None:
        """A part of the rounded constant.

        Raises:
            CastOverflowError: A finite value is not finite any more.
        """
        if isinstance(self.recipe, Transpose):  # the order of the source is the quicker one
            transpose = self.recipe
            Transpose(Cast(transpose.recipe, self.to), transpose.permutation).fill(out, at)
            return
        for band in bands(at, BAND_BYTES, self.recipe.dtype.itemsize) if self.cuts(0) else [at]:
            place = out[within(band, at)]
            with scratch(place.shape, self.recipe.dtype) as before, contiguous(place) as after:
                self.recipe.fill(before, band)
                after.copy_(before)
                if self.to.itemsize < 4 and not is_finite(after) and is_narrowed(before, after):
                    raise CastOverflowError

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return self.recipe.cuts(dim)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.recipe.describe()} -> cast {dtype_name(self.to)}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.recipe,)


@dataclass(frozen=True, eq=False)
class Concat(Recipe):
    """Recipes of one dtype joined along a dimension, as q, k and v packed into one product."""

    recipes: tuple[Recipe, ...]
    dim: int = 0

    def __post_init__(self) -> None:
        rests = {(*r.shape[: self.dim], *r.shape[self.dim + 1 :]) for r in self.recipes}
        if len(rests) != 1 or len({r.dtype for r in self.recipes}) != 1:
            shapes = [(list(r.shape), r.dtype) for r in self.recipes]
            raise ValueError(f"cannot concatenate along dimension {self.dim}: {shapes}")

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        first = self.recipes[0].shape
        return (
            *first[: self.dim],
            sum(r.shape[self.dim] for r in self.recipes),
            *first[self.dim + 1 :],
        )

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.recipes[0].dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        wanted_start, wanted_stop = at[self.dim]
        first = 0
        for recipe in self.recipes:
            length = recipe.shape[self.dim]
            start, stop = max(wanted_start, first), min(wanted_stop, first + length)
            if start < stop:
                inner = (*at[: self.dim], (start - first, stop - first), *at[self.dim + 1 :])
                recipe.fill(out.narrow(self.dim, start - wanted_start, stop - start), inner)
            first += length

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        return all(
            recipe.cuts(dim) or (dim == self.dim and recipe.shape[dim] == 1)
            for recipe in self.recipes
        )

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        shown = [recipe.describe() for recipe in self.recipes[:_SHOWN]]
        if len(self.recipes) > _SHOWN:
            shown.append(f"and {len(self.recipes) - _SHOWN} more")
        return f"concat dim {self.dim} of ({'; '.join(shown)})"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return self.recipes


@dataclass(frozen=True, eq=False)
class Converted(Recipe):
    """A conversion between a checkpoint's layout and the model's: experts stacked, one chunk.

    Attributes:
        sources: What the conversion reads.
        convert: The conversion, from the sources' tensors in order to the one result.
        result_shape: Shape of the result.
        label: What it does, in a few words.
    """

    sources: tuple[Recipe, ...]
    convert: Callable[[Sequence[Tensor]], Tensor]
    result_shape: tuple[int, ...]
    label: str

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.result_shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.sources[0].dtype

    def fill(self, out: Tensor, at: Box) -> None:  # noqa: D102 - documented on Recipe
        out.copy_(self.evaluate()[within(at, whole(self.shape))])

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        result = self.convert([source.evaluate() for source in self.sources])
        if tuple(result.shape) != self.shape or result.dtype != self.dtype:
            raise BaseModelError(
                f"{self.describe()} gave another tensor than planned",
                expected=f"{dtype_name(self.dtype)}{list(self.shape)}",
                found=f"{dtype_name(result.dtype)}{list(result.shape)}",
                next_step="use the config.json that belongs to these weights",
            )
        return result.contiguous()

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        first, *more = self.sources
        others = f" and {len(more)} more" if more else ""
        return f"{first.describe()}{others} -> {self.label}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return self.sources


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is finite."""
    if not tensor.is_floating_point():
        return True
    # A sum takes a tenth of the time; only if it is not finite, which huge values can do too, ask.
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def is_narrowed(before: Tensor, after: Tensor) -> bool:
    """Whether a cast made a finite value infinite."""
    return bool((torch.isfinite(before) & ~torch.isfinite(after)).any())


def cast(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """The recipe in a dtype, or itself if it has it; a cast of a cast keeps both roundings."""
    return recipe if recipe.dtype == dtype else Cast(recipe, dtype)


def rounded(recipes: Mapping[str, Recipe], dtype: torch.dtype) -> dict[str, Recipe]:
    """Recipes of the same dtypes with floats rounded to another on the way; shared ones shared."""
    by_id = {
        id(recipe): cast(cast(recipe, dtype), recipe.dtype)
        if recipe.dtype.is_floating_point
        else recipe
        for recipe in recipes.values()
    }
    return {name: by_id[id(recipe)] for name, recipe in recipes.items()}


def without_cast(recipe: Recipe) -> Recipe:
    """The recipe before its last roundings: what a fold starts from."""
    while isinstance(recipe, Cast):
        recipe = recipe.recipe
    return recipe


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as messages write it: `float16`."""
    return str(dtype).removeprefix("torch.")
