"""Recipes: where a constant's bytes come from and what is done to them.

A recipe knows its shape and dtype at once and gives its tensor when asked. `fold` is constant
propagation over recipes: it wraps the base's recipe in a `Fold`. Two names that share one weight
share one recipe object.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bone_fx.adapters import METHODS
from bone_fx.errors import BaseModelError, FoldError
from bone_fx.weights.safetensors_file import TensorEntry, read_tensor

Order = tuple[int, str, int]
_WITHOUT_FILE: Order = (1, "", 0)


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
    def evaluate(self) -> Tensor:
        """The constant: on the CPU, contiguous, of `shape` and `dtype`; computed at every call."""

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

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        return read_tensor(self.path, self.entry)

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

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        return self.tensor.detach().cpu().contiguous()

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.origin} {_name(self.dtype)}{list(self.shape)}"


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

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        return self.recipe.evaluate().permute(self.permutation).contiguous()

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

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        return self.recipe.evaluate().to(self.to)

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"{self.recipe.describe()} -> cast {_name(self.to)}"

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
            found = [(list(r.shape), r.dtype) for r in self.recipes]
            raise ValueError(f"cannot concatenate along dimension {self.dim}: {found}")

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

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        result = torch.empty(self.shape, dtype=self.dtype)
        start = 0
        for recipe in self.recipes:
            length = recipe.shape[self.dim]
            result.narrow(self.dim, start, length).copy_(recipe.evaluate())
            start += length
        return result

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        return f"concat dim {self.dim} of ({'; '.join(r.describe() for r in self.recipes)})"

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

    def evaluate(self) -> Tensor:  # noqa: D102 - documented on Recipe
        result = self.convert([source.evaluate() for source in self.sources])
        if tuple(result.shape) != self.shape or result.dtype != self.dtype:
            raise BaseModelError(
                f"{self.describe()} gave another tensor than planned",
                expected=f"{_name(self.dtype)}{list(self.shape)}",
                found=f"{_name(result.dtype)}{list(result.shape)}",
            )
        return result.contiguous()

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        first, *more = self.sources
        others = f" and {len(more)} more" if more else ""
        return f"{first.describe()}{others} -> {self.label}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return self.sources


@dataclass(frozen=True, eq=False)
class FoldStep:
    """One trained block to fold into a weight.

    Attributes:
        method: Row of `bone_fx.adapters.METHODS`.
        block: The block.
        adapter: Name of the adapter it came from.
    """

    method: str
    block: Tensor
    adapter: str


@dataclass(frozen=True, eq=False)
class Fold(Recipe):
    """A weight with blocks folded into it, in float32, rounded once.

    Attributes:
        base: The weight's recipe, as close to the stored bytes as can be (no cast before the fold).
        steps: Blocks in the order in which they act.
        transposed: Whether the weight is stored `[I, O]`, as in HF `Conv1D`.
        to: Dtype of the result.
        site: Name of the layer, for errors.
    """

    base: Recipe
    steps: tuple[FoldStep, ...]
    transposed: bool
    to: torch.dtype
    site: str

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102 - documented on Recipe
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:  # noqa: D102 - documented on Recipe
        return self.to

    def evaluate(self) -> Tensor:
        """The folded weight.

        Raises:
            FoldError: The result is not finite.
        """
        weight = self.base.evaluate().float()
        w_OI = weight.t() if self.transposed else weight
        for step in self.steps:
            w_OI = METHODS[step.method].fold(w_OI, step.block.float())
        result = (w_OI.t() if self.transposed else w_OI).to(self.to).contiguous()
        if not torch.isfinite(result).all():
            raise FoldError(
                f"folding {self._blocks()} into {self.site} gives values that are not finite",
                expected=f"finite weights in {_name(self.to)}",
                found=self._blame(weight, w_OI),
                next_step="check the adapter's training, or export in fp32",
            )
        return result

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        folds = " -> ".join(f"fold {step.method}({step.adapter})" for step in self.steps)
        rounded = f" -> cast {_name(self.to)}" if self.to != torch.float32 else ""
        return f"{self.base.describe()} -> {folds}{rounded}"

    def inputs(self) -> tuple[Recipe, ...]:  # noqa: D102 - documented on Recipe
        return (self.base,)

    def _blocks(self) -> str:
        return " and ".join(
            f"{step.method} block of adapter {step.adapter!r}" for step in self.steps
        )

    def _blame(self, weight: Tensor, folded: Tensor) -> str:
        if not torch.isfinite(weight).all():
            return "NaN or Inf in the base weight"
        for step in self.steps:
            if not torch.isfinite(step.block).all():
                return f"NaN or Inf in the block of adapter {step.adapter!r}"
        if not torch.isfinite(folded).all():
            return "an overflow in float32"
        return (
            f"values up to {folded.abs().max().item():.3g}, beyond {torch.finfo(self.to).max:.3g}"
        )


def cast(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """The recipe in a dtype, or itself if it has it; a cast of a cast keeps both roundings."""
    return recipe if recipe.dtype == dtype else Cast(recipe, dtype)


def rounded(recipes: Mapping[str, Recipe], dtype: torch.dtype) -> dict[str, Recipe]:
    """Recipes of the same dtypes with floats rounded to another on the way; shared ones shared."""
    made = {
        id(recipe): cast(cast(recipe, dtype), recipe.dtype)
        if recipe.dtype.is_floating_point
        else recipe
        for recipe in recipes.values()
    }
    return {name: made[id(recipe)] for name, recipe in recipes.items()}


def without_cast(recipe: Recipe) -> Recipe:
    """The recipe before its last roundings: what a fold starts from."""
    while isinstance(recipe, Cast):
        recipe = recipe.recipe
    return recipe


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
