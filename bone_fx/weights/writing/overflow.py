"""A value that was finite and is not after a cast: which, of which constant."""

from __future__ import annotations

import torch

from bone_fx.errors import VerificationError
from bone_fx.weights.recipes.recipe import Cast
from bone_fx.weights.writing.stream import Piece


def refuse_overflow(piece: Piece) -> None:
    """Say which cast of a constant makes values infinite.

    Raises:
        VerificationError: One does; names the constant and its largest value.
    """
    waiting = [piece.recipe]
    while waiting:
        recipe = waiting.pop()
        waiting += recipe.inputs()
        if not isinstance(recipe, Cast):
            continue
        before = recipe.recipe.evaluate()
        overflown = torch.isfinite(before) & ~torch.isfinite(before.to(recipe.to))
        if overflown.any():
            largest = before[overflown].abs().max().item()
            raise VerificationError(
                f"{int(overflown.sum())} values of {piece.name!r} overflow {recipe.to}",
                expected=f"values up to {torch.finfo(recipe.to).max:.6g}",
                found=f"{largest:.6g} in {recipe.recipe.describe()}",
                next_step="choose a wider dtype: fp32, or a base that is stored in one",
            )
