"""The one table of tolerances. A difference is relative to max(1, the largest reference value).

A bound is what rounding in that dtype explains, with a small margin; a test that needs more has
found something.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIMITS: dict[str, dict[torch.dtype, float]] = {
    # A folded weight or a block: one product or sum in float32, rounded once.
    "weight": {
        torch.float64: 1e-12,
        torch.float32: 1e-6,
        torch.bfloat16: 2**-8,
        torch.float16: 2**-11,
    },
    # The output of one adapted layer, folded against unfolded.
    "output": {
        torch.float64: 1e-11,
        torch.float32: 1e-5,
        torch.bfloat16: 2**-6,
        torch.float16: 2**-9,
    },
    # Logits of a small model, whose layers each add the error of an output.
    "logits": {
        torch.float64: 1e-10,
        torch.float32: 1e-5,
        torch.bfloat16: 2**-4,
        torch.float16: 2**-7,
    },
    # Logits after folding: the products are taken in another order.
    "folded logits": {
        torch.float64: 1e-10,
        torch.float32: 5e-5,
        torch.bfloat16: 2**-4,
        torch.float16: 2**-7,
    },
    # Gradients sum over rows and tokens.
    "gradient": {
        torch.float64: 1e-9,
        torch.float32: 1e-4,
        torch.bfloat16: 2**-4,
        torch.float16: 2**-6,
    },
}
"""Largest difference by kind of value and by the dtype it was computed in."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over max(1, largest expected value); infinite for NaN or another shape."""
    return _over(found, expected, 1.0)


def scaled_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value, however small: for gradients."""
    return _over(found, expected, torch.finfo(torch.float32).tiny)


def _over(found: Tensor, expected: Tensor, least: float) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    gap = (found - expected).abs().max() / expected.abs().max().clamp_min(least)
    return float("inf") if bool(gap.isnan()) else float(gap)


def assert_agrees(
    found: Tensor, expected: Tensor, kind: str, dtype: torch.dtype | None = None
) -> None:
    """Fail if the two differ by more than the table allows for `kind` in `dtype` (of `found`)."""
    limit = LIMITS[kind][dtype or found.dtype]
    gap = difference(found, expected)
    assert gap <= limit, (
        f"{kind} differs by {gap:.3g}, allowed {limit:.3g}; "
        f"shapes {tuple(found.shape)} and {tuple(expected.shape)}"
    )
