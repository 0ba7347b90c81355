"""How far adapters move each weight: `‖W' - W‖ / ‖W‖`, in the Frobenius norm.

It is measured on the parts of a weight while they are folded, when they are in a core's caches. A
block that is only added says by itself how far it moves a weight; for others the weight is kept and
compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

Corner = tuple[int, ...]


@dataclass(frozen=True)
class Change:
    """What adapters change, layer by layer; filled while weights are folded, by any thread."""

    _measured: dict[str, dict[Corner, tuple[float, float]]] = field(
        default_factory=dict, repr=False
    )

    def measure(self, site: str, corner: Corner, delta_squares: float, squares: float) -> None:
        """Note a part of a weight.

        Args:
            site: Name of the layer.
            corner: What tells the part from the layer's others: its first output and input.
            delta_squares: Sum of the squares of what the fold adds.
            squares: Sum of the squares before the fold.
        """
        self._measured.setdefault(site, {})[corner] = (delta_squares, squares)

    def report(self) -> dict[str, float | None]:
        """`‖W' - W‖ / ‖W‖` by layer, to three digits; None for a weight of zeros.

        The same for the same weights, whatever the order in which they were folded.
        """
        ratios: dict[str, float | None] = {}
        for site, parts in sorted(self._measured.items()):
            delta, weight = (math.fsum(values) for values in zip(*parts.values(), strict=True))
            ratio = math.sqrt(delta / weight) if weight > 0 else math.inf
            ratios[site] = float(f"{ratio:.3g}") if math.isfinite(ratio) else None
        return ratios


def squares(tensor: Tensor) -> float:
    """The sum of the squares of a contiguous tensor."""
    values = tensor.view(-1)
    return float(torch.dot(values, values))
