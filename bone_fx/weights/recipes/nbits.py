"""Groups of a weight as codes of 4 or 8 bits, a scale and a zero point, in ONNX Runtime's format.

A value is `scale * (code - zero_point)`. Without importance the bytes are those of ONNX Runtime's
own quantizer: round to nearest over the group's range. With importance each group takes, of a grid
of narrower ranges and of other zero points, the one with the smallest squared error, in which an
input counts as much as its mean square does: the expected squared error of a product is
`sum_k E[x_k^2] * error_k^2` where inputs are uncorrelated. A search that counts all inputs alike is
no better than none: narrow ranges lose the large weights, which are where the large inputs are.

Shape letters: N outputs, K inputs, G groups of a row, B values of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHRINKS = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7)
_SHIFTS = (-2, -1, 1, 2)
_CHUNK = 1 << 18  # values at a time: what a search compares then stays in a core's caches


@dataclass(frozen=True)
class Scheme:
    """How a weight is quantized.

    Attributes:
        bits: 4 or 8.
        block_size: Values that share a scale: a power of two, at least 16.
        symmetric: No zero point: zero is the middle code.
        scale_dtype: Dtype of the scales; the codes are chosen for the rounded scale.
    """

    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float32

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class QuantizedGroups:
    """A quantized weight.

    Attributes:
        codes: uint8 `[N, G, B]`, one code a byte.
        scales: `[N, G]` in the scheme's dtype.
        zeros: The zero points, uint8 `[N, G]`.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """The weight `[N, K]` that the codes stand for, in float32."""
        shifted = self.codes.float() - self.zeros.float().unsqueeze(-1)
        return (shifted * self.scales.float().unsqueeze(-1)).flatten(1)

    def rows(self, part: slice) -> QuantizedGroups:
        """Some of the rows."""
        return QuantizedGroups(self.codes[part], self.scales[part], self.zeros[part])

    @staticmethod
    def joined(parts: Sequence[QuantizedGroups]) -> QuantizedGroups:
        """The rows of several, in order."""
        return QuantizedGroups(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scales for part in parts]),
            torch.cat([part.zeros for part in parts]),
        )


def quantize(
    weight_NK: Tensor, scheme: Scheme, importance_K: Tensor | None = None
) -> QuantizedGroups:
    """Quantize a weight, rows at a time.

    Args:
        weight_NK: The weight, float32 `[N, K]`, K a multiple of the block size.
        scheme: How.
        importance_K: What the squared error of each input counts, float32 `[K]`, none negative.
            None rounds to nearest.
    """
    groups = weight_NK.shape[1] // scheme.block_size
    rows = max(1, _CHUNK // weight_NK.shape[1])
    counts = None if importance_K is None else importance_K.float().view(groups, scheme.block_size)
    parts = [
        _quantize_rows(
            weight_NK[start : start + rows].float().reshape(-1, groups, scheme.block_size),
            scheme,
            counts,
        )
        for start in range(0, weight_NK.shape[0], rows)
    ]
    return QuantizedGroups.joined(parts)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of 4 bits two a byte along the last dimension, the first in the low half; 8 as is."""
    if bits == 8:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=8)  # what ORT's quantizer fills in
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """What `pack` was given; `length` codes along the last dimension."""
    if bits == 8:
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :length]


def _quantize_rows(weight: Tensor, scheme: Scheme, counts: Tensor | None) -> QuantizedGroups:
    best = encode(weight, *_range(weight, scheme, 1.0), scheme)
    if counts is None:
        return best
    error = _error(weight, best, counts)

    def keep_better(other: QuantizedGroups) -> None:
        nonlocal best, error
        best, error = _better(weight, best, error, other, counts)

    for shrink in _SHRINKS:
        if shrink != 1.0:
            keep_better(encode(weight, *_range(weight, scheme, shrink), scheme))
    for _ in range(2):
        keep_better(_refit(weight, best, scheme, counts))
    if not scheme.symmetric:
        for shift in _SHIFTS:
            zero = (best.zeros.float() + shift).clamp(0, scheme.levels)
            keep_better(encode(weight, best.scales.float(), zero, scheme))
            keep_better(_refit(weight, best, scheme, counts))
    return best


def _range(weight: Tensor, scheme: Scheme, shrink: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group for its range times `shrink`, as float32."""
    low, high = weight.amin(-1), weight.amax(-1)
    if scheme.symmetric:
        # The value that lies furthest from zero gets the code 0, at the longer end of the codes.
        extreme = torch.where(high.abs() > low.abs(), high, low)
        return extreme * shrink / -scheme.middle, torch.full_like(extreme, scheme.middle)
    low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    scale = (high - low) / scheme.levels
    zero = torch.where(scale == 0, low, -low / scale)
    return scale, zero.clamp(0, scheme.levels)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> QuantizedGroups:
    """Nearest codes of groups `[..., B]` for scales and zero points `[...]` in float32."""
    stored = scale.to(scheme.scale_dtype)
    zero = _round(zero)
    codes = nearest_codes(weight, stored.float(), zero, scheme)
    return QuantizedGroups(codes.to(torch.uint8), stored, zero.to(torch.uint8))


def nearest_codes(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme) -> Tensor:
    """The same codes alone, in float32, for scales and zero points as they are stored."""
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale).unsqueeze(-1)
    places = (weight * inverse).add_(zero.unsqueeze(-1))
    return places.add_(0.5).floor_().clamp_(0, scheme.levels)  # `_round`, where nothing is negative


def _refit(
    weight: Tensor, groups: QuantizedGroups, scheme: Scheme, counts: Tensor
) -> QuantizedGroups:
    """The scale of least squares for the codes that a group has, and new codes for it."""
    shifted = groups.codes.float() - groups.zeros.float().unsqueeze(-1)
    counted = shifted * counts
    square = (shifted * counted).sum(-1)
    floor = torch.finfo(torch.float32).tiny
    scale = torch.where(
        square == 0, groups.scales.float(), (weight * counted).sum(-1) / square.clamp(min=floor)
    )
    return encode(weight, scale, groups.zeros.float(), scheme)


def _error(weight: Tensor, groups: QuantizedGroups, counts: Tensor) -> Tensor:
    return ((groups.values().view_as(weight) - weight).square() * counts).sum(-1)


def _better(
    weight: Tensor, best: QuantizedGroups, error: Tensor, other: QuantizedGroups, counts: Tensor
) -> tuple[QuantizedGroups, Tensor]:
    others = _error(weight, other, counts)
    wins = others < error
    chosen = QuantizedGroups(
        torch.where(wins.unsqueeze(-1), other.codes, best.codes),
        torch.where(wins, other.scales, best.scales),
        torch.where(wins, other.zeros, best.zeros),
    )
    return chosen, torch.where(wins, others, error)


def _round(values: Tensor) -> Tensor:
    """Halves away from zero, as C's roundf."""
    return torch.where(values < 0, (values - 0.5).ceil(), (values + 0.5).floor())
