"""Bone.

One block D `[R, O]` shared by all shards of the input (PEFT 0.18.1 `init_weights=True/False`; MiSS
default).

`W'[o, i] = W[o, i] + D[i mod R, o]`, or without folding `y = x Wᵀ + S(x) D` with `S(x)[t, j]` the
sum of `x[t, i]` over `i ≡ j (mod R)`. The definition by column index covers a ragged last shard and
R > I. (arXiv 2409.15371, equation 4.)

Shapes: T tokens, I in_features, O out_features, R block size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def block_shape(in_features: int, out_features: int, r: int, mini_r: int) -> tuple[int, ...]:
    """Shape `[R, O]` of the block."""
    return (r, out_features)


def refusal(in_features: int, out_features: int, r: int, mini_r: int) -> str | None:
    """Bone fits every layer."""
    return None


def fold(w_OI: Tensor, d_RO: Tensor) -> Tensor:
    """The folded weight `[O, I]`, a new tensor."""
    out_features, in_features = w_OI.shape
    r = d_RO.shape[0]
    d_OR = d_RO.t().contiguous()
    if in_features % r == 0:
        shards = w_OI.reshape(out_features, -1, r) + d_OR.unsqueeze(1)
        return shards.view(out_features, in_features)
    return w_OI + d_OR.repeat(1, -(-in_features // r))[:, :in_features]


def fold_(w_OI: Tensor, d_RO: Tensor) -> Tensor:
    """The same in place of a contiguous weight."""
    return spread_sums_(w_OI, d_RO.t().contiguous())


def delta(w_OI: Tensor, d_RO: Tensor) -> Tensor:
    """`W' - W`, `[O, I]`; it does not depend on the weight's values."""
    return fold(torch.zeros_like(w_OI), d_RO)


def part(d_RO: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """The block `[R, rows]` that does to a part of the weight what `d_RO` does to the whole."""
    return d_RO[:, slice(*rows)].roll(-columns[0], 0)


def delta_squares(d_RO: Tensor, in_features: int) -> float:
    """`‖W' - W‖²` of a weight with so many inputs: each row of D acts on every R-th of them."""
    r = d_RO.shape[0]
    times_R = torch.arange(in_features + r - 1, in_features - 1, -1) // r
    return float(d_RO.square().sum(1, dtype=torch.float64).cpu() @ times_R.double())


def shard_sums(x_TI: Tensor, r: int, dtype: torch.dtype | None = None) -> Tensor:
    """S(x) `[..., R]`.

    The sum of the shards of width R of the last dimension, the ragged last one included.

    Args:
        x_TI: `[..., I]`.
        r: R.
        dtype: Of the sum and its terms; None for that of x.
    """
    in_features = x_TI.shape[-1]
    if in_features % r:
        x_TI = functional.pad(x_TI, (0, -in_features % r))
    if x_TI.shape[-1] == r:
        return x_TI if dtype is None else x_TI.to(dtype)
    return x_TI.reshape(*x_TI.shape[:-1], x_TI.shape[-1] // r, r).sum(-2, dtype=dtype)


def spread_sums_(dx_TI: Tensor, dsum_TR: Tensor) -> Tensor:
    """Add the gradient of S(x) to every shard of the gradient of x, in place."""
    r = dsum_TR.shape[-1]
    in_features = dx_TI.shape[-1]
    even = in_features // r * r
    if even:
        dx_TI[:, :even].view(len(dx_TI), even // r, r).add_(dsum_TR.unsqueeze(1))
    if even < in_features:
        dx_TI[:, even:].add_(dsum_TR[:, : in_features - even])
    return dx_TI


def term(x_TI: Tensor, d_RO: Tensor, out_features: int) -> Tensor:
    """What the adapter adds to the base product: `S(x) D`, `[..., O]`."""
    return shard_sums(x_TI, d_RO.shape[0]) @ d_RO
