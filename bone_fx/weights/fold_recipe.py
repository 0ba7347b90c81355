"""The recipe of a weight with trained blocks folded into it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bone_fx.adapters import METHODS
from bone_fx.errors import FoldError
from bone_fx.weights.boxes import Box, bands
from bone_fx.weights.recipes import BAND_BYTES, Recipe, dtype_name


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

    def fill(self, out: Tensor, at: Box) -> None:
        """A part of the folded weight.

        Raises:
            FoldError: A value is not finite.
        """
        outputs, inputs = reversed(at) if self.transposed else at
        wide = inputs if self._additive() else (0, self.shape[0 if self.transposed else 1])
        target = out.t() if self.transposed else out
        grain = self._grain()
        first = outputs[0] // grain * grain
        last = -(-outputs[1] // grain) * grain
        kept = slice(inputs[0] - wide[0], inputs[1] - wide[0])
        for rows, columns in bands(((first, last), wide), BAND_BYTES, 4, grain=grain):
            folded = self._folded(rows, columns)[:, kept]
            start, stop = max(rows[0], outputs[0]), min(rows[1], outputs[1])
            target[start - outputs[0] : stop - outputs[0]].copy_(
                folded[start - rows[0] : stop - rows[0]]
            )

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        along_outputs = (dim == 1) == self.transposed
        return self.base.cuts(dim) and (along_outputs or self._additive())

    def _folded(self, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """Rows of the folded weight in the dtype of the result; rows are outputs."""
        box = (columns, rows) if self.transposed else (rows, columns)
        stored = self.base.part(box).float()
        weight = w_OI = stored.t() if self.transposed else stored
        for step in self.steps:
            method = METHODS[step.method]
            w_OI = method.fold(w_OI, method.part(step.block.float(), rows, columns))
        result = w_OI.to(self.to)
        if not torch.isfinite(result).all():
            raise FoldError(
                f"folding {self._blocks()} into {self.site} gives values that are not finite",
                expected=f"finite weights in {dtype_name(self.to)}",
                found=self._blame(weight, w_OI),
                next_step="check the adapter's training, or export in fp32",
            )
        return result

    def _additive(self) -> bool:
        return all(METHODS[step.method].additive for step in self.steps)

    def _grain(self) -> int:
        """What the number of rows of a part is a multiple of."""
        steps = (step for step in self.steps if not METHODS[step.method].additive)
        return math.lcm(*(step.block.shape[-1] for step in steps))

    def describe(self) -> str:  # noqa: D102 - documented on Recipe
        folds = " -> ".join(f"fold {step.method}({step.adapter})" for step in self.steps)
        rounded = f" -> cast {dtype_name(self.to)}" if self.to != torch.float32 else ""
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
