"""The cache that a model is given while its decoder graph is captured.

It stores nothing: new keys and values go back to the model as they are, and the pasts wait for the
attention function, which alone knows how to join them. So the model's own code needs no change, and
no concatenation enters a graph whose attention is an operator.

Shape letters: B batch, K key/value heads, S new tokens, P past tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

from bone_fx.capture.decoder.pasts import Pasts
from bone_fx.capture.stamping.layer_number import LayerNumber
from bone_fx.errors import CaptureError


class PassThroughCache:
    """Follows the interface of `transformers.Cache` as far as decoders use it during a forward.

    Args:
        pasts: Past key and value of each layer.
        query_offset: Number of tokens before the new ones.
        total: Number of tokens, new ones included.
    """

    is_compileable = False

    def __init__(
        self,
        pasts: Pasts,
        *,
        query_offset: int | SymInt,
        total: int | SymInt,
    ) -> None:
        self.pasts = pasts
        self.presents: dict[int, tuple[Tensor, Tensor]] = {}
        self.stamped: set[int] = set()
        self._query_offset = query_offset
        self._total = total
        self._waiting: tuple[int, Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int | LayerNumber,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Remembers the layer's new keys and values, [B, K, S, D], and gives them back."""
        layer_idx = layer_idx.value if isinstance(layer_idx, LayerNumber) else layer_idx
        self.refuse_waiting()
        if layer_idx in self.presents or not 0 <= layer_idx < len(self.pasts):
            raise CaptureError(
                f"layer {layer_idx} updates the key/value cache twice or out of range",
                expected=f"one update for each of {len(self.pasts)} layers",
            )
        self._waiting = (layer_idx, key_states, value_states)
        return key_states, value_states

    def take(self, key: Tensor, value: Tensor, where: str) -> tuple[int, tuple[Tensor, Tensor]]:
        """Gives the layer and the past of the keys and values that an attention is about to use.

        Raises:
            CaptureError: They are not the ones that this layer put into the cache, so the graph
                would not be the model.
        """
        if self._waiting is None:
            raise CaptureError(
                f"{where} attends without putting keys and values into the cache",
                expected="past_key_values.update(key, value, layer) just before each attention",
            )
        layer, new_key, new_value = self._waiting
        self._waiting = None
        if key is not new_key or value is not new_value:
            raise CaptureError(
                f"{where} changes keys or values between the cache and the attention",
                expected="the tensors that past_key_values.update gave back",
            )
        return layer, self.pasts.of_layer(layer)

    def finish(self) -> list[tuple[Tensor, Tensor]]:
        """The present key and value of every traced layer, in order.

        Raises:
            CaptureError: A layer has none, so its attention went another way than the attention
                interface.
        """
        self.refuse_waiting()
        layers = range(len(self.pasts))
        missing = [i for i in layers if i not in self.presents and i not in self.stamped]
        if missing:
            raise CaptureError(
                f"layers {missing} have no attention that a key/value cache belongs to",
                expected=f"one attention for each of {len(self.pasts)} layers",
            )
        return [self.presents[i] for i in self.traced()]

    def traced(self) -> list[int]:
        """The layers that were traced, in order; the others are nodes until they are expanded."""
        return sorted(self.presents)

    def refuse_waiting(self) -> None:
        """Raises CaptureError if a layer updated the cache and no attention took its keys."""
        if self._waiting is not None:
            raise CaptureError(
                f"the attention of layer {self._waiting[0]} does not go through "
                "transformers' attention interface",
                expected="a model that calls ALL_ATTENTION_FUNCTIONS",
                next_step="this architecture cannot be exported as a decoder yet",
            )

    def get_seq_length(self, layer_idx: int = 0) -> int | SymInt:
        """Number of tokens before the new ones."""
        del layer_idx
        return self._query_offset

    def get_query_offset(self, layer_idx: int = 0) -> int | SymInt:
        """Number of tokens before the new ones."""
        del layer_idx
        return self._query_offset

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int | SymInt, int]:
        """Length and offset of the keys that a mask covers."""
        del query_length, layer_idx
        return self._total, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: the cache has no length of its own."""
        del layer_idx
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """No layer of this cache drops keys; windows belong to the attention."""
        return [False] * len(self.pasts)

    @property
    def layers(self) -> list[None]:
        """One entry a layer, without content."""
        return [None] * len(self.pasts)


def concatenated(past: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Present key and value [B, K, P + S, D] from the past and the new ones."""
    key, value = (torch.cat(pair, dim=2) for pair in zip(past, new, strict=True))
    return key, value
