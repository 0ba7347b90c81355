"""The recipe of a weight with trained blocks folded into it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bone_fx.adapters import METHODS, Block, LowRank
from bone_fx.errors import FoldError
from bone_fx.weights.recipes.change import Change, squares
from bone_fx.weights.recipes.recipe import BAND_BYTES, Recipe, dtype_name, is_finite
from bone_fx.weights.recipes.rounding import Rounding
from bone_fx.weights.storage.boxes import Box, bands, sizes
from bone_fx.weights.storage.scratch import put, scratch

_SAMPLED = 8
"""What a cast costs is measured on the first of so many shares of every part's outputs."""


@dataclass(frozen=True, eq=False)
class FoldStep:
    """One trained block to fold into a weight.

    Attributes:
        method: Row of `bone_fx.adapters.METHODS`.
        block: The block.
        adapter: Name of the adapter it came from.
    """

    method: str
    block: Block
    adapter: str

    def part(self, outputs: tuple[int, int], inputs: tuple[int, int]) -> FoldStep:
        """The step of some outputs and inputs of the weight."""
        return replace(self, block=METHODS[self.method].part(self.block, outputs, inputs))


@dataclass(frozen=True)
class FoldPart:
    """Some outputs and inputs of a weight that can be folded by themselves.

    Attributes:
        outputs: First output and the one behind the last.
        inputs: First input and the one behind the last.
        transposed: Whether the weight is stored `[I, O]`.
    """

    outputs: tuple[int, int]
    inputs: tuple[int, int]
    transposed: bool

    @property
    def stored(self) -> Box:
        """The part as the weight is stored."""
        box = (self.outputs, self.inputs)
        return box[::-1] if self.transposed else box

    @property
    def corner(self) -> tuple[int, int]:
        """First output and input."""
        return self.outputs[0], self.inputs[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of outputs and of inputs."""
        return self.outputs[1] - self.outputs[0], self.inputs[1] - self.inputs[0]

    def step(self, step: FoldStep) -> FoldStep:
        """The step that does to the part what a step does to the whole weight."""
        return step.part(self.outputs, self.inputs)


@dataclass(frozen=True, eq=False)
class Fold(Recipe):
    """A weight with blocks folded into it, in float32, rounded once.

    A weight that stays in float64 is folded in float64.

    Attributes:
        base: The weight's recipe, as close to the stored bytes as can be (no cast before the fold).
        steps: Blocks in the order in which they act.
        transposed: Whether the weight is stored `[I, O]`, as in HF `Conv1D`.
        to: Dtype of the result.
        site: Name of the layer, for errors.
        rounding: Told what the cast costs, if it is to the dtype that it is for.
        change: Told how far the blocks move the weight.
        number: Of the weight among those that are stacked in a layer.
    """

    base: Recipe
    steps: tuple[FoldStep, ...]
    transposed: bool
    to: torch.dtype
    site: str
    rounding: Rounding | None = None
    change: Change | None = None
    number: int = 0

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
        target = out.t() if self.transposed else out
        for part in self.parts(BAND_BYTES, outputs, inputs):
            start, stop = max(part.outputs[0], outputs[0]), min(part.outputs[1], outputs[1])
            place = target[start - outputs[0] : stop - outputs[0]]
            with scratch(part.shape, self.to) as result:
                self._fold(part, result)
                kept = result[
                    start - part.outputs[0] : stop - part.outputs[0],
                    inputs[0] - part.inputs[0] : inputs[1] - part.inputs[0],
                ]
                put(kept, place)

    def parts(
        self,
        nbytes: int,
        outputs: tuple[int, int] | None = None,
        inputs: tuple[int, int] | None = None,
    ) -> Iterator[FoldPart]:
        """Parts of about `nbytes` bytes in float32 that cover some outputs and inputs, or all."""
        features = self.shape[::-1] if self.transposed else self.shape
        outputs, inputs = outputs or (0, features[0]), inputs or (0, features[1])
        acting = [step for step in self.steps if not METHODS[step.method].additive]
        grain = math.lcm(*(METHODS[step.method].grain(step.block) for step in acting))
        first, last = outputs[0] // grain * grain, -(-outputs[1] // grain) * grain
        wide = (0, features[1]) if acting else inputs
        for rows, columns in bands(((first, last), wide), nbytes, 4, grain=grain):
            yield FoldPart(rows, columns, self.transposed)

    @property
    def _exact(self) -> torch.dtype:
        """The dtype that blocks act in, as in `passes.fold.fold_weight`."""
        stays_wide = self.base.dtype == self.to == torch.float64
        return torch.float64 if stays_wide else torch.float32

    def cuts(self, dim: int) -> bool:  # noqa: D102 - documented on Recipe
        along_outputs = (dim == 1) == self.transposed
        additive = all(METHODS[step.method].additive for step in self.steps)
        return self.base.cuts(dim) and (along_outputs or additive)

    def _fold(self, part: FoldPart, result: Tensor) -> None:
        """Compute a part `[outputs, inputs]` of the folded weight in the dtype of the result."""
        with scratch(part.shape, self._exact) as w_OI:
            self._read(part, w_OI)
            sample = slice(-(-part.shape[0] // _SAMPLED))
            measures = self.rounding is not None and self.rounding.to == self.to
            before = w_OI[sample].clone() if measures else None
            self._fold_blocks(part, w_OI)
            result.copy_(w_OI)
            if not is_finite(result):
                raise FoldError(
                    f"folding {self._blocks()} into {self.site} gives values that are not finite",
                    expected=f"finite weights in {dtype_name(self.to)}",
                    found=self._blame(part, w_OI),
                    next_step="check the adapter's training, or export in fp32",
                )
            if before is not None and self.rounding is not None:
                corner = (self.number, *part.corner)
                self.rounding.measure(self.site, corner, before, w_OI[sample], result[sample])

    def _fold_blocks(self, part: FoldPart, w_OI: Tensor) -> None:
        """Fold the blocks into a part in place, and tell `change` how far they move it."""
        methods = [METHODS[step.method] for step in self.steps]
        blocks = [part.step(step).block.detach() for step in self.steps]
        measures = self.change is not None
        delta_squares = methods[0].delta_squares if len(methods) == 1 else None
        before = squares(w_OI) if measures else 0.0
        kept = w_OI.clone() if measures and delta_squares is None else None
        for method, block in zip(methods, blocks, strict=True):
            method.fold_(w_OI, block.to(self._exact))
        if self.change is None:
            return
        if kept is not None:
            moved = squares(torch.sub(w_OI, kept, out=kept))
        else:
            assert delta_squares is not None
            moved = delta_squares(blocks[0], part.shape[1])
        self.change.measure(self.site, (self.number, *part.corner), moved, before)

    def _read(self, part: FoldPart, w_OI: Tensor) -> None:
        """Read a part `[outputs, inputs]` of the weight before the fold."""
        with scratch(sizes(part.stored), self.base.dtype) as stored:
            self.base.fill(stored, part.stored)
            if not self.transposed:
                w_OI.copy_(stored)
                return
            with scratch(stored.shape, self._exact) as exact:
                w_OI.copy_(exact.copy_(stored).t())

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

    def _blame(self, part: FoldPart, folded: Tensor) -> str:
        if not torch.isfinite(self.base.part(part.stored)).all():
            return "NaN or Inf in the base weight"
        for step in self.steps:
            block = step.block
            tensors = block.tensors() if isinstance(block, LowRank) else (block,)
            if not all(torch.isfinite(tensor).all() for tensor in tensors):
                return f"NaN or Inf in the block of adapter {step.adapter!r}"
        if not torch.isfinite(folded).all():
            return f"an overflow in {dtype_name(self._exact)}"
        return (
            f"values up to {folded.abs().max().item():.3g}, beyond {torch.finfo(self.to).max:.3g}"
        )
