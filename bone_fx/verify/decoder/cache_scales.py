"""The scales of a cache in 8 bits against the keys and values that they are for.

The reference rounds its keys and values by the graph's own scales, so that a wrong scale would go
unseen by all but what the cache costs, and of fp8, whose steps grow with what is kept, by that too.

Shape letters: K key/value heads, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from bone_fx.errors import LOOK, VerificationError
from bone_fx.verify.decoder.quantized_cache import SIDES, QuantizedCache

LEAST, MOST = 1 / 8, 1.5
"""What the median channel may hold of what its scale has room for.

Scales are measured on a longer text, leave a quarter free and are those of a pair of channels where
a position turns one into the other: of a text 0.6 is usual, of a dozen tokens 0.3.
"""


def check_scales(model: nn.Module, cache: QuantizedCache, ids: Sequence[int]) -> None:
    """Hold the scales of every layer against the keys and values of a text.

    Args:
        model: The reference under its adapters.
        cache: How the graph keeps its cache.
        ids: Token ids of the text.

    Raises:
        VerificationError: The scales of a layer's keys or values are those of something else.
    """
    whole: Any = model
    measured = _Measured(whole.config)
    with torch.no_grad():
        whole(input_ids=torch.tensor([list(ids)]), past_key_values=measured, use_cache=True)
    for layer, pair in cache.scales.items():
        for side, scale, largest in zip(SIDES, pair, measured.largest[layer], strict=True):
            share = float((largest / (scale[:, 0] * cache.numbers.highest)).median())
            if LEAST <= share <= MOST:
                continue
            raise VerificationError(
                f"verification failed: layer {layer}: the scales of its {side}s are not theirs",
                expected=f"{side}s of {LEAST} to {MOST} times the largest that a scale has room"
                " for, in the median channel",
                found=f"{share:.3g} times",
                next_step=LOOK,
            )


class _Measured(DynamicCache):
    """Notes the largest key and value of each channel, `[K, D]`, by layer."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.largest: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Past and new keys and values `[1, K, T, D]`."""
        key, value = (x.detach().abs().amax((0, 2)).float() for x in (key_states, value_states))
        self.largest[layer_idx] = key, value
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)
