"""Tokens that a router of experts sends where rounding decides.

Two experts of nearly one score change places when activations are rounded, and the token's output
with them: neither graph nor reference is wrong. What stands before the first such token of a causal
model does not depend on it.

Shape letters: S tokens, X experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bone_fx.verify.parity import Parity

ROUTED = "routes_by_rounding"
UNDECIDED = 1.0
"""Largest difference, relative to the largest value, from the first such token on."""


class Routes(TorchFunctionMode):
    """While open, watches how clearly `topk` chooses among the scores of each of S tokens.

    Args:
        tokens: S, of one text.
        tolerance: Largest difference of an output, relative to its largest value; scores that lie
            closer are not told apart.
    """

    def __init__(self, tokens: int, tolerance: float) -> None:
        super().__init__()
        self.decided = tokens
        """How many tokens from the first are sent where rounding does not matter."""
        self._tokens = tokens
        self._margin = tolerance

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Look at the call, and make it."""
        del types
        if func in (torch.topk, Tensor.topk):
            self._look(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look(self, scores: Tensor, k: int, *_: Any, **__: Any) -> None:
        scores_SX = scores.detach().float().reshape(-1, scores.shape[-1])
        if scores_SX.shape[0] != self._tokens or k >= scores_SX.shape[1]:
            return
        ordered = scores_SX.sort(dim=-1, descending=True).values
        gaps = ordered[:, k - 1] - ordered[:, k]
        # What another choice has ruled out, as of groups of experts, is -inf and no score.
        largest = scores_SX.masked_fill(~scores_SX.isfinite(), 0).abs().amax(-1)
        close = gaps <= self._margin * largest
        if bool(close.any()):
            self.decided = min(self.decided, int(close.int().argmax()))


def say_undecided(parity: Parity, decided: int, tokens: int) -> None:
    """Warn if most tokens of the cases stand behind one that rounding may route otherwise."""
    if 2 * decided < tokens:
        parity.warnings.append(
            f"{tokens - decided} of {tokens} tokens were held to {UNDECIDED:g} of the largest value"
            f" and not to {parity.tolerance:g}: their experts' scores lie too close together"
        )
