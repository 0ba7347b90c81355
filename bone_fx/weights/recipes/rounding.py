"""How much of an adapter's effect on a weight survives the cast to the dtype of the result.

With e the effect `W' - W` in float32 and c the difference of the two casts, the share that survives
is `1 - |c - e|² / |e|²`, at least 0. It is measured on a sample of each weight while it is folded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ENOUGH = 0.9
"""A layer that keeps less of the adapter's effect is worth a warning."""

Corner = tuple[int, ...]
_BETTER = {"bfloat16": "fp16", "float16": "fp32"}


@dataclass(frozen=True)
class Rounding:
    """What a cast costs, layer by layer; filled while weights are folded, by any thread.

    Attributes:
        to: Dtype of the results.
    """

    to: torch.dtype
    _measured: dict[str, dict[Corner, tuple[float, float]]] = field(
        default_factory=dict, repr=False
    )

    def measure(
        self, site: str, corner: Corner, weight: Tensor, folded: Tensor, result: Tensor
    ) -> None:
        """Measure a part of a weight.

        Args:
            site: Name of the layer.
            corner: What tells the part from the layer's others: its first output and input.
            weight: The part before the fold, float32.
            folded: After it, float32.
            result: After the cast.
        """
        effect = folded - weight
        lost = result.float() - weight.to(self.to).float() - effect
        squares = (float(lost.square().sum()), float(effect.square().sum()))
        self._measured.setdefault(site, {})[corner] = squares

    def shares(self) -> dict[str, float]:
        """Share of the effect that survives by layer, to three digits; layers without effect miss.

        The same for the same weights, whatever the order in which they were folded.
        """
        shares = {}
        for site, parts in sorted(self._measured.items()):
            lost, effect = (math.fsum(values) for values in zip(*parts.values(), strict=True))
            if effect > 0:
                shares[site] = round(max(0.0, 1 - lost / effect), 3)
        return shares

    def warnings(self) -> list[str]:
        """What to tell a person: nothing if every layer keeps enough."""
        shares = self.shares()
        poor = {site: share for site, share in shares.items() if share < ENOUGH}
        if not poor:
            return []
        name = str(self.to).removeprefix("torch.")
        worst = min(poor, key=lambda site: poor[site])
        return [
            (
                f"{len(poor)} of {len(shares)} adapted layers keep less than {ENOUGH:.0%} of the "
                f"adapter's effect in {name} ({worst}: {poor[worst]:.0%}); "
                f"{_BETTER.get(name, 'fp32')} keeps more"
            )
        ]

    def report(self) -> dict[str, Any]:
        """What the manifest says."""
        return {"dtype": str(self.to).removeprefix("torch."), "effect_kept": self.shares()}
