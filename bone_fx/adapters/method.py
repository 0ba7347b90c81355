"""What every adapter method answers.

Shape letters: T tokens, I in_features, O out_features, R block size, M mini_r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

BlockShape = Callable[[int, int, int, int], tuple[int, ...]]
Refusal = Callable[[int, int, int, int], str | None]
Fold = Callable[[Tensor, Tensor], Tensor]
Term = Callable[[Tensor, Tensor, int], Tensor]
Squares = Callable[[Tensor, int], float]
Part = Callable[[Tensor, tuple[int, int], tuple[int, int]], Tensor]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: The method's name in `BoneConfig.method`.
        additive: True if the delta does not depend on the weight, so that adapters add up in any
            order.
        block_shape: `(I, O, R, M) -> shape` of the trained block.
        refusal: `(I, O, R, M) -> reason` why the block cannot fit such a layer, or None if it can.
        fold: `(w_OI, block) -> W'_OI`, out of place, differentiable, in the dtype the operands
            promote to.
        fold_: The same in place of a contiguous weight, which is returned; not differentiable.
        term: `(x_TI, block, O) -> y_TO`, what an additive method adds to the base product without
            folding; None for methods that act on the weight.
        delta: `(w_OI, block) -> W' - W`, without the cancellation of subtracting.
        part: `(block, rows, columns) -> block` that does to those rows and columns of the weight
            what the whole block does to all of it; first index and the one behind the last. A
            method that is not additive takes multiples of R and all columns.
        delta_squares: `(part, I) -> ‖W' - W‖²` of a part of a block with so many inputs; None for
            methods that act on the weight.
    """

    name: str
    additive: bool
    block_shape: BlockShape
    refusal: Refusal
    fold: Fold
    fold_: Fold
    term: Term | None
    delta: Fold
    part: Part
    delta_squares: Squares | None = None
