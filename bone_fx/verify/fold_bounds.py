"""Between which values a folded weight must lie.

Bone and mini add one number to each value, and BAT multiplies tiles of one size: these folds have
one result, to the bit. The product of a LoRA is summed in an order that hangs on the shapes of the
parts in which it is computed, so its values may differ by what float32 rounds.

Shape letters: I in_features, O out_features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bone_fx.adapters import Block, LowRank
from bone_fx.passes.fold import fold_weight

_OPERATIONS = 4
"""Roundings of a value besides those of the product's sum."""


def fold_bounds(
    weight: Tensor, steps: Sequence[tuple[str, Block]], *, transposed: bool, layer: str
) -> tuple[Tensor, Tensor]:
    """The least and the largest values of a folded weight; one tensor twice where it is exact.

    Args:
        weight: The weight before the fold, `[O, I]`, or `[I, O]` if `transposed`.
        steps: `(method, block)` in the order in which the adapters apply.
        transposed: Whether the weight is stored `[I, O]`.
        layer: The layer's name for messages.

    Raises:
        FoldError: The folded weight holds NaN or Inf.
    """
    if not any(isinstance(block, LowRank) for _, block in steps):
        folded = fold_weight(weight, steps, transposed=transposed, layer=layer)
        return folded, folded
    compute = torch.promote_types(weight.dtype, torch.float32)
    w_OI = (weight.t() if transposed else weight).to(compute)
    slack_OI = torch.zeros_like(w_OI)
    for method, block in steps:
        after_OI = fold_weight(w_OI, [(method, block)], layer=layer)
        slack_OI = _slack(w_OI, after_OI, slack_OI, block.to(compute), method)
        w_OI = after_OI
    low, high = w_OI - slack_OI, w_OI + slack_OI
    return (low.t(), high.t()) if transposed else (low, high)


def lies_within(actual: Tensor, low: Tensor, high: Tensor) -> bool:
    """Whether values lie between two others that are rounded as they are."""
    low, high = low.to(actual.dtype), high.to(actual.dtype)
    return bool(((low <= actual) & (actual <= high)).all())


def _slack(
    before_OI: Tensor, after_OI: Tensor, slack_OI: Tensor, block: Block, method: str
) -> Tensor:
    """How far two computations of a step may be apart, given how far their weights may be."""
    unit = torch.finfo(before_OI.dtype).eps
    if not isinstance(block, LowRank):
        if method == "bat":  # values of a tile are summed with the block's as factors
            size = block.abs()
            zero = torch.zeros_like(slack_OI)
            summed = slack_OI + unit * (block.shape[-1] + _OPERATIONS) * before_OI.abs()
            slack_OI = fold_weight(summed, [(method, size)]) - fold_weight(zero, [(method, size)])
        return slack_OI + unit * _OPERATIONS * after_OI.abs()
    # |Σ b a| of every order of summation is at most ‖b‖ ‖a‖.
    largest_OI = block.b.norm(dim=1).unsqueeze(1) * block.a.norm(dim=0)
    rounded_OI = before_OI.abs().add_(largest_OI.mul_(abs(block.scale)))
    slack_OI = rounded_OI.mul_(unit * (block.rank + _OPERATIONS)).add_(slack_OI)
    if block.magnitude is None:
        return slack_OI
    summed_OI = fold_weight(before_OI, [("lora", block)])
    length_O1 = summed_OI.norm(dim=1, keepdim=True)
    factor_O1 = block.magnitude.abs().unsqueeze(1) / length_O1
    turned_O1 = slack_OI.norm(dim=1, keepdim=True) / length_O1 + unit * _OPERATIONS
    return slack_OI.mul_(factor_O1).add_(after_OI.abs().mul_(turned_O1))
