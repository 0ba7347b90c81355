"""How far two sets of outputs lie apart, and how far they may."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bone_fx.errors import LOOK, VerificationError

TOLERANCE = {"fp64": 1e-6, "fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Largest difference allowed by export dtype, relative to the reference's largest value.

A rounding in float32 is 6e-8 of a value. A layer of a decoder adds some ten sums in another order
than torch, each of which is off by about the square root of its length times that: 3e-6 for 2,560
columns, 1e-5 to 4e-5 after 30 layers that do not cancel: 1e-4 is a margin of two. A rounding in
fp16 is 4.9e-4 and happens at each operator's output: 40 layers of six, as a random walk, make
7.6e-3; 2e-2 is a margin of two and a half. bf16 has three bits less, and its graphs are held to the
tolerance of the twin they are run as. In fp64 the model's own constants in float32 set the limit.
"""

INT8_CACHE = 0.2
"""Largest difference that a cache in int8 may make to the logits of the same graph with floats.

A step is 1 % of the largest key or value that a channel held (1.25 / 127), a rounding 0.29 steps in
the mean: 1 % of the root mean square of a channel whose largest of a thousand is 3.3 of these. The
scores are off by 1 % of their spread, weights by as much times a score of one or two, and values
by 1 % more: 2 % of what an attention gives; after 30 layers, as a random walk, 0.11 of what they
add. 0.2 is a margin of two. Beside this, the graph is held to the tolerance of its dtype with a
reference whose keys and values are rounded to the graph's own codes.
"""

FP8_CACHE = 0.5
"""The same for a cache in fp8, whose steps grow with what is kept.

A number of three bits behind the point is rounded by 2.7 % of itself in the root mean square, where
int8 is off by 1 % of a channel's: 2.7 times as much, 0.3 after 30 layers. 0.5 is a margin of one
and two thirds; beyond that there would be nothing left to tell from another text.
"""

FP8_CACHE_IN_FP16 = 0.1
"""Largest difference allowed between a graph in fp16 with a cache in fp8 and a reference that
rounds to fp8 too.

What fp16 leaves open moves a key or value over the middle between two codes, a step of 9 % of it in
the mean, once in as many times as it goes into the step. In the root mean square that is the square
root of its product with the step: 4 % where activations are massive and fp16 is off by the 2e-2
above (for all other tokens the reference takes the graph's codes). 0.1 is a margin of two. The keys
and values themselves are held to 2e-2 and half a step.
"""

SMALLEST = {"fp64": 1e-30, "fp32": 1e-30, "fp16": 2.0**-14, "bf16": 1e-30}
"""What a difference is relative to where the reference is smaller: zero, or fp16's subnormals."""

DIFFERS_FROM_BASE = 100
"""An adapter must move the outputs by more than this many tolerances of fp32; less is a warning."""


@dataclass(frozen=True)
class Generated:
    """What a decoder's graph generated greedily.

    Attributes:
        prompt: The tokens before it.
        tokens: The tokens of the graph.
        margins: How far the logit of each is ahead of the next best, relative to the largest.
    """

    prompt: list[int]
    tokens: list[int]
    margins: list[float]


@dataclass
class Parity:
    """What was compared and what came out.

    Attributes:
        tolerance: Largest difference allowed between ONNX Runtime and torch.
        floor: The smallest value that a difference is relative to.
        figures: Largest relative difference by pair: `onnx_vs_unmerged`, `onnx_vs_folded`,
            `unmerged_vs_folded`, `adapter_effect`; where weights were quantized or rounded also
            `onnx_vs_written`, and where the graph rounds activations too `rounded_activations`; of
            a cache in 8 bits what it costs, `int8_cache` or `fp8_cache`; for a user's own module
            `onnx_vs_torch` alone. Of a decoder also `long_texts` and `greedy_tokens`, a pair's
            `_top1` and `_kl`, and `nll_base`, `nll_adapter` and `nll_export` of the user's samples.
        cases: Names of the comparisons that were made.
        skipped: Cases that could not be run, and why.
        warnings: What a person should know though it is no failure.
        reference: Where the weights of the torch model were: `in memory`, or `streamed`.
        generated: What a decoder's graph generated, as it is published.
    """

    tolerance: float
    floor: float = SMALLEST["fp32"]
    figures: dict[str, float] = field(default_factory=dict)
    cases: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    reference: str = "in memory"
    generated: Generated | None = None

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
        if actual.shape == reference.shape and not actual.numel():
            return
        gap = difference(actual, reference, self.floor)
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
            expected=f"at most {allowed:.3g} of the largest value",
            found=what,
            next_step=LOOK,
        )

    def skip(self, case: str, reason: str) -> None:
        """Record that a case could not be run."""
        self.skipped[case] = reason

    def add_constants(self, compared: int, others: Sequence[str]) -> None:
        """Record how many constants are the reference's, and those that only outputs speak for."""
        self.cases.append(f"{compared} constants, bit for bit or to half a step")
        if others:
            self.skip(f"constants {', '.join(others)}", "no parameter names them")

    def compare_choices(self, pair: str, actual: Tensor, reference: Tensor) -> None:
        """Record, for logits `[S, V]`, how often both choose one token, and how they are spread."""
        if reference.shape != actual.shape or not len(reference):
            return
        same = float((actual.argmax(-1) == reference.argmax(-1)).float().mean())
        spread = torch.nn.functional.kl_div(
            actual.log_softmax(-1), reference.log_softmax(-1), reduction="none", log_target=True
        )
        kl = float(spread.sum(-1).max().clamp_min(0))
        name = f"{pair}_top1"
        self.figures[name] = min(self.figures.get(name, 1.0), same)
        self.figures[f"{pair}_kl"] = max(self.figures.get(f"{pair}_kl", 0.0), kl)


def check_effect(parity: Parity, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Record how far the adapters move the outputs: pairs are (base, unmerged).

    No pair means that no adapter was given.
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


def difference(actual: Tensor, reference: Tensor, floor: float = SMALLEST["fp32"]) -> float:
    """Largest absolute difference over the largest reference value, or a floor if that is larger.

    Infinite for NaN, Inf or another shape; 0 for two tensors of zeros.
    """
    if actual.shape != reference.shape:
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    actual, reference = actual.float(), reference.float()
    # Any NaN or Inf of either is one of the largest difference.
    gap = float((actual - reference).abs().max() / reference.abs().max().clamp_min(floor))
    return gap if math.isfinite(gap) else math.inf
