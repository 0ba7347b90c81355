"""What every adapter method answers.

A block is what an adapter trained for one weight: a tensor of Bone, mini and BAT, a `LowRank` of
LoRA and DoRA.

Shape letters: T tokens, I in_features, O out_features, R block size, M mini_r.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from bone_fx.adapters.lora import LowRank
from bone_fx.errors import AdapterError

Block = Tensor | LowRank

BlockShape = Callable[[int, int, int, int], tuple[int, ...]]
Refusal = Callable[[int, int, int, int], str | None]
# Blocks are of the one kind that a method takes.
Fold = Callable[[Tensor, Any], Tensor]
Term = Callable[[Tensor, Any, int], Tensor]
Squares = Callable[[Any, int], float]
Part = Callable[[Any, tuple[int, int], tuple[int, int]], Any]
Grain = Callable[[Any], int]


def not_trained(*sizes: int) -> NoReturn:
    """What a method that is only read answers when a fresh block is asked for."""
    raise AdapterError(
        "adapters of the LoRA family are folded, exported and verified here, not trained",
        next_step="train them with PEFT; bone-export takes the folder that it saves",
    )


def any_row(block: Block) -> int:
    """The grain of a method that takes each row of a weight by itself."""
    return 1


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    Attributes:
        name: The method's name, `method` of an adapter's configuration.
        additive: True if the delta does not depend on the weight, so that adapters add up in any
            order.
        fold: `(w_OI, block) -> W'_OI`, out of place, differentiable, in the dtype the operands
            promote to.
        fold_: The same in place of a contiguous weight, which is returned; not differentiable.
        delta: `(w_OI, block) -> W' - W`, without the cancellation of subtracting.
        part: `(block, rows, columns) -> block` that does to those rows and columns of the weight
            what the whole block does to all of it; first index and the one behind the last. A
            method that is not additive takes multiples of its grain, and all columns.
        grain: `block -> rows` of the weight that a method which is not additive takes together.
        delta_squares: `(part, I) -> ‖W' - W‖²` of a part of a block with so many inputs; None for
            methods that act on the weight.
        block_shape: `(I, O, R, M) -> shape` of the block to train.
        refusal: `(I, O, R, M) -> reason` why such a block cannot fit a layer, or None if it can.
        term: `(x_TI, block, O) -> y_TO`, what an additive method adds to the base product without
            folding; None for methods that act on the weight, or are not trained.
    """

    name: str
    additive: bool
    fold: Fold
    fold_: Fold
    delta: Fold
    part: Part
    grain: Grain = any_row
    delta_squares: Squares | None = None
    block_shape: BlockShape = not_trained
    refusal: Refusal = not_trained
    term: Term | None = None

    def misfit(self, block: Block, sizes: tuple[int, int], r: int, mini_r: int) -> str | None:
        """Why a block cannot act on a layer of `sizes` (I, O); None if it can."""
        if isinstance(block, LowRank):
            return block.misfit(*sizes)
        reason = self.refusal(*sizes, r, mini_r)
        if reason is not None:
            return reason
        expected = self.block_shape(*sizes, r, mini_r)
        if tuple(block.shape) == expected:
            return None
        return f"shape {list(block.shape)} in place of {list(expected)} for {self.name} with r={r}"
