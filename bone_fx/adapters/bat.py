"""BAT: one square block a row of weight blocks (PEFT 0.18.1 `init_weights="bat"`).

`W'ab = Wab + Wab Ba + Ba` for the R x R block in block row a and block column b. Block row a of W
is contiguous, so `W.view(O/R, R·I/R, R)` is a view whose batched product with B is `Wab Ba` for all
b: no copy of W is permuted.

Shapes: I in_features, O out_features, R block size, A = O/R, N = R·I/R = I.
"""

from __future__ import annotations

import torch
from torch import Tensor


def block_shape(in_features: int, out_features: int, r: int, mini_r: int) -> tuple[int, ...]:
    """Shape `[O/R, R, R]` of the block."""
    return (out_features // r, r, r)


def refusal(in_features: int, out_features: int, r: int, mini_r: int) -> str | None:
    """R must divide I and O."""
    if in_features % r == 0 and out_features % r == 0:
        return None
    fitting = [
        n
        for n in range(1, min(in_features, out_features) + 1)
        if in_features % n == out_features % n == 0
    ]
    near = sorted(fitting, key=lambda n: abs(n - r))[:3]
    fits = ", ".join(map(str, sorted(near)))
    return (
        f"r={r} must divide in_features={in_features} and out_features={out_features} for bat; "
        f"r that would fit: {fits}"
    )


def delta(w_OI: Tensor, b_ARR: Tensor) -> Tensor:
    """`W' - W`, `[O, I]`: it depends on the weight that BAT is given."""
    out_features, in_features = w_OI.shape
    blocks, r, _ = b_ARR.shape
    w_ANR = w_OI.reshape(blocks, r * (in_features // r), r)
    product = torch.bmm(w_ANR, b_ARR).view(blocks, r, in_features // r, r)
    return (product + b_ARR.unsqueeze(2)).view(out_features, in_features)


def fold(w_OI: Tensor, b_ARR: Tensor) -> Tensor:
    """The folded weight `[O, I]`, a new tensor.

    The delta is formed in it, and W added to that: no third tensor of its size.
    """
    in_features = w_OI.shape[1]
    blocks, r, _ = b_ARR.shape
    folded = torch.empty_like(w_OI, memory_format=torch.contiguous_format)
    folded.view(blocks, r, in_features // r, r).copy_(b_ARR.unsqueeze(2))
    rows = blocks, in_features, r
    folded.view(rows).baddbmm_(w_OI.reshape(rows), b_ARR)
    return folded.add_(w_OI)


def fold_(w_OI: Tensor, b_ARR: Tensor) -> Tensor:
    """The same in place of a contiguous weight; the product still needs a second one."""
    return w_OI.copy_(fold(w_OI, b_ARR))


def part(b_ARR: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """The blocks of some rows of the weight, a multiple of R of them, with all columns."""
    r = b_ARR.shape[-1]
    return b_ARR[rows[0] // r : rows[1] // r]


def grain(b_ARR: Tensor) -> int:
    """R: a row of weight blocks cannot be cut."""
    return b_ARR.shape[-1]


def gradient(w_OI: Tensor, dw_OI: Tensor, r: int, *, in_turn: bool = False) -> Tensor:
    """The block's gradient `[O/R, R, R]` from the folded weight's.

    `dBa = Σ_b Wabᵀ dW'ab + dW'ab`.

    Args:
        w_OI: The weight before the fold.
        dw_OI: The folded weight's gradient.
        r: R.
        in_turn: Whether the products of a row's blocks are rounded before they are added, as in
            PEFT, instead of one product a row.
    """
    out_features, in_features = w_OI.shape
    blocks, shards = out_features // r, in_features // r
    direct = dw_OI.reshape(blocks, r, shards, r).sum(2)
    if in_turn:
        w_NARR = w_OI.reshape(blocks, r, shards, r).permute(2, 0, 3, 1).unbind(0)
        dw_NARR = dw_OI.reshape(blocks, r, shards, r).unbind(2)
        return _sum_of_products(w_NARR, dw_NARR).add_(direct)
    w_ANR = w_OI.reshape(blocks, r * shards, r)
    dw_ANR = dw_OI.reshape(blocks, r * shards, r)
    return direct.baddbmm_(w_ANR.transpose(1, 2), dw_ANR)


def _sum_of_products(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> Tensor:
    """`Σ left right`, added in the order of PyTorch's sum on a CPU: in groups of 16."""
    total: Tensor | None = None
    for first in range(0, len(left), 16):
        group = torch.bmm(left[first], right[first])
        rest = slice(first + 1, first + 16)
        for factors in zip(left[rest], right[rest], strict=True):
            group.baddbmm_(*factors)
        total = group if total is None else total.add_(group)
    assert total is not None
    return total


def weight_gradient(dw_OI: Tensor, b_ARR: Tensor) -> Tensor:
    """The gradient of the weight before the fold, `[O, I]`: `dWab = dW'ab + dW'ab Baᵀ`."""
    out_features, in_features = dw_OI.shape
    blocks, r, _ = b_ARR.shape
    dw_ANR = dw_OI.reshape(blocks, r * (in_features // r), r)
    return dw_OI + torch.bmm(dw_ANR, b_ARR.transpose(1, 2)).view(out_features, in_features)
