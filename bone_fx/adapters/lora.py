"""LoRA: a product of two thin matrices and a number (PEFT 0.18.1 and 0.21.2 `LORA`).

`W' = W + s B A`. Embeddings are the same along their outputs: `W[v, d] += s (B A)[d, v]`.
(arXiv 2106.09685.)

Shapes: I in_features, O out_features, R rank, E experts whose weights are stacked.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """What LoRA and DoRA train for one weight, or for a stack of them.

    Attributes:
        a: A, `[R, I]`, or `[E, R, I]` of stacked weights.
        b: B, `[O, R]`, or `[E, O, R]`.
        scale: s.
        magnitude: DoRA's length of each row of the folded weight; None for LoRA.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def method(self) -> str:
        """Row of `bone_fx.adapters.METHODS`."""
        return "lora" if self.magnitude is None else "dora"

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-2]

    @property
    def is_stacked(self) -> bool:
        """Whether it acts on a stack of weights."""
        return self.a.dim() == 3

    def tensors(self) -> tuple[Tensor, ...]:
        """Its tensors."""
        magnitude = () if self.magnitude is None else (self.magnitude,)
        return (self.a, self.b, *magnitude)

    def to(self, *args: Any) -> LowRank:
        """The same with its tensors on another device or in another dtype, as `Tensor.to`."""
        a_RI, b_OR, *magnitude = (tensor.to(*args) for tensor in self.tensors())
        return LowRank(a_RI, b_OR, self.scale, *magnitude)

    def detach(self) -> LowRank:
        """Itself: its tensors were read, and no gradient flows to them."""
        return self

    def expert(self, number: int) -> LowRank:
        """What acts on one of the stacked weights."""
        return replace(self, a=self.a[number], b=self.b[number])

    def part(self, rows: tuple[int, int], columns: tuple[int, int]) -> LowRank:
        """What does to some rows and columns of a weight what all of it does to the whole."""
        magnitude = None if self.magnitude is None else self.magnitude[slice(*rows)]
        a_RI, b_OR = self.a[:, slice(*columns)], self.b[slice(*rows)]
        return LowRank(a_RI, b_OR, self.scale, magnitude)

    def misfit(self, in_features: int, out_features: int, experts: int = 0) -> str | None:
        """Why it cannot act on weights of such sizes; None if it can."""
        stack = (experts,) if experts else ()
        expected = [[*stack, self.rank, in_features], [*stack, out_features, self.rank]]
        expected += [] if self.magnitude is None else [[out_features]]
        shapes = [list(tensor.shape) for tensor in self.tensors()]
        return None if shapes == expected else f"shapes {shapes} in place of {expected}"


def fold(w_OI: Tensor, block: LowRank) -> Tensor:
    """The folded weight `[O, I]`, a new tensor."""
    return torch.addmm(w_OI, block.b, block.a, alpha=block.scale)


def fold_(w_OI: Tensor, block: LowRank) -> Tensor:
    """The same in place of a contiguous weight."""
    return w_OI.addmm_(block.b, block.a, alpha=block.scale)


def delta(w_OI: Tensor, block: LowRank) -> Tensor:
    """`W' - W`, `[O, I]`; it does not depend on the weight's values."""
    return (block.b @ block.a).mul_(block.scale).to(w_OI.dtype)


def delta_squares(block: LowRank, in_features: int) -> float:
    """`‖W' - W‖² = s² tr(Bᵀ B A Aᵀ)`, of two small products."""
    a_RI, b_OR = block.a.double(), block.b.double()
    return block.scale**2 * float(((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum())
