"""Masks: recognised by what they allow, never built.

A model asks transformers for a mask and hands it to its attention. While a decoder is captured the
mask it gets is a `MaskKind`: an object that says what was asked for, so that the attention function
can make an attribute of it. The mask is the truth about a sliding window; what the model says
elsewhere is not read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bone_fx.capture.trace.outside_trace import untraced
from bone_fx.errors import CaptureError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MaskKind:
    """A causal mask.

    Attributes:
        window: Number of keys that a token sees, itself included; None for all before it.
    """

    window: int | None


@dataclass(frozen=True)
class UnknownMask:
    """A mask that is no `MaskKind`: no error yet, as models ask for masks that no layer uses.

    Attributes:
        reason: What was wrong with it, to be raised by the attention that uses it.
    """

    reason: CaptureError


def recognise_mask(mask_function: MaskFunction, horizon: int) -> MaskKind:
    """Runs a mask function of transformers on positions below `horizon` and says what it is.

    Raises:
        CaptureError: It is neither causal nor causal with one window for every token (bidirectional
            or chunked, say).
    """
    return untraced(lambda: _probe(mask_function, horizon))


def _probe(mask_function: MaskFunction, horizon: int) -> MaskKind:
    keys = torch.arange(horizon + 8)
    last = horizon - 1
    counts = {}
    for query in (last, max(last - 1, 0), last // 2, last // 3):
        position = torch.tensor([[query]])
        zero = torch.zeros(1, 1, dtype=torch.long)
        allowed = mask_function(zero, zero, position, keys[None]).expand(1, len(keys))[0]
        count = int(allowed.sum())
        nearest = (keys <= query) & (keys > query - count)
        if count == 0 or not torch.equal(allowed, nearest):
            raise CaptureError(
                "the attention mask is neither causal nor a causal sliding window",
                expected="each token sees the tokens before it, or the last few of them",
                found=f"token {query} sees {count} of {len(keys)} positions in another order",
            )
        counts[query] = count
    window = counts[last]
    if any(count != min(query + 1, window) for query, count in counts.items()):
        raise CaptureError(
            "the attention window depends on the position",
            expected="one window for every token",
            found=", ".join(f"token {query} sees {count}" for query, count in counts.items()),
        )
    return MaskKind(window if window < horizon else None)


class MaskRecogniser:
    """The mask function that transformers calls while a decoder is captured.

    Args:
        horizon: Number of positions that the model will see.
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon

    def __call__(self, *_: Any, mask_function: MaskFunction, **__: Any) -> MaskKind | UnknownMask:
        """Gives the kind of mask in place of a mask."""
        try:
            return recognise_mask(mask_function, self._horizon)
        except CaptureError as reason:
            return UnknownMask(reason)
