"""MiSS mini.

A Bone block D `[R, M]` repeated O/M times along its columns (PEFT 0.21.2 MiSS
`init_weights="mini"`).

Shapes: T tokens, I in_features, O out_features, R block size, M mini_r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bone_fx.adapters import bone


def block_shape(in_features: int, out_features: int, r: int, mini_r: int) -> tuple[int, ...]:
    """Shape `[R, M]` of the block."""
    return (r, mini_r)


def refusal(in_features: int, out_features: int, r: int, mini_r: int) -> str | None:
    """M must divide O."""
    if mini_r > 0 and out_features % mini_r == 0:
        return None
    fitting = [m for m in range(1, out_features + 1) if out_features % m == 0]
    near = sorted(fitting, key=lambda m: abs(m - mini_r))[:3]
    fits = ", ".join(map(str, sorted(near)))
    return (
        f"mini_r={mini_r} does not divide out_features={out_features}; "
        f"mini_r that would fit: {fits}"
    )


def widen(d_RM: Tensor, out_features: int) -> Tensor:
    """The Bone block `[R, O]` that the mini block stands for."""
    return d_RM.repeat(1, out_features // d_RM.shape[1])


def fold(w_OI: Tensor, d_RM: Tensor) -> Tensor:
    """The folded weight `[O, I]`; a new tensor."""
    return bone.fold(w_OI, widen(d_RM, w_OI.shape[0]))


def fold_(w_OI: Tensor, d_RM: Tensor) -> Tensor:
    """The same in place of a contiguous weight."""
    return bone.fold_(w_OI, widen(d_RM, w_OI.shape[0]))


def delta(w_OI: Tensor, d_RM: Tensor) -> Tensor:
    """`W' - W`, `[O, I]`; it does not depend on the weight's values."""
    return bone.delta(w_OI, widen(d_RM, w_OI.shape[0]))


def part(d_RM: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """The block `[R, rows]` that does to a part of the weight what `d_RM` does to the whole."""
    outputs = torch.arange(*rows, device=d_RM.device) % d_RM.shape[1]
    return d_RM[:, outputs].roll(-columns[0], 0)


def term(x_TI: Tensor, d_RM: Tensor, out_features: int) -> Tensor:
    """What the adapter adds to the base product, `[..., O]`.

    The narrow product is computed once, then repeated.
    """
    y_TM = bone.term(x_TI, d_RM, d_RM.shape[1])
    return y_TM.repeat(*([1] * (y_TM.dim() - 1)), out_features // d_RM.shape[1])
