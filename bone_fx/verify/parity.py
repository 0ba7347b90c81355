"""How far two sets of outputs lie apart, and how far they may."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bone_fx.errors import VerificationError

TOLERANCE = {"fp64": 1e-6, "fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference allowed by export dtype, relative to max(1, the largest reference value)."""

DIFFERS_FROM_BASE = 100
"""An adapter must move the outputs by more than this many tolerances of fp32; less is a warning."""


@dataclass
class Parity:
    """What was compared and what came out.

    Attributes:
        tolerance: Largest difference allowed between ONNX Runtime and torch.
        figures: Largest relative difference by pair: `onnx_vs_unmerged`, `onnx_vs_folded`,
            `unmerged_vs_folded`, `adapter_effect`; where weights were quantized or rounded also
            `onnx_vs_written`, and where the graph rounds activations too `rounded_activations`; for
            a user's own module `onnx_vs_torch` alone.
        cases: Names of the comparisons that were made.
        warnings: What a person should know though it is no failure.
    """

    tolerance: float
    figures: dict[str, float] = field(default_factory=dict)
    cases: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def compare(
        self,
        pair: str,
        case: str,
        actual: Tensor,
        reference: Tensor,
        tolerance: float | None = None,
    ) -> None:
        """Record a pair's difference in one case and refuse it if it is too large.

        Raises:
            VerificationError: The shapes differ, a value is not finite, or the difference is above
                the tolerance.
        """
        allowed = self.tolerance if tolerance is None else tolerance
        gap = difference(actual, reference)
        if case not in self.cases:
            self.cases.append(case)
        self.figures[pair] = max(self.figures.get(pair, 0.0), gap)
        if gap <= allowed:
            return
        if not bool(torch.isfinite(actual).all()):
            what = "NaN or Inf in the output"
        else:
            what = f"a difference of {gap:.3g}"
        raise VerificationError(
            f"verification failed: {pair.replace('_', ' ')}, {case}: {what}",
            expected=f"at most {allowed:.3g} of max(1, largest value)",
            found=what,
            next_step="nothing was published; look at the build that is kept as <output>.rejected",
        )


def check_effect(parity: Parity, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Record how far the adapters move the outputs: pairs are (base, unmerged).

    None means that no adapter was given.
    """
    if not pairs:
        parity.warnings.append("no adapter was given: the base itself was exported")
        return
    effect = max(difference(base, adapted) for base, adapted in pairs)
    parity.figures["adapter_effect"] = effect
    if effect <= DIFFERS_FROM_BASE * TOLERANCE["fp32"]:
        parity.warnings.append(
            f"the adapters hardly change the outputs: by {effect:.2g} of the largest value"
        )


def difference(actual: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over max(1, largest reference value).

    Infinite for NaN, Inf or another shape.
    """
    if actual.shape != reference.shape:
        return float("inf")
    actual, reference = actual.float(), reference.float()
    if not bool(torch.isfinite(actual).all()) or not bool(torch.isfinite(reference).all()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    return float((actual - reference).abs().max() / reference.abs().max().clamp_min(1.0))
