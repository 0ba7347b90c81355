"""Attention that a model computes by itself, without transformers' attention interface.

Such a model (bloom, falcon) gets a cache that really joins past and new tokens, and masks that are
really built. Its trace then holds its own attention between marks: `Present(new, past, last, total,
bias)` stands for the joined keys, and for the joined values. `attention_regions` finds out by
running what stands behind them, `write_attention` puts one operator in its place.

Shape letters: B batch, H query heads, K key/value heads, S new tokens, T past and new tokens, D
head size, M positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.nn import functional

from bone_fx.capture.decoder.attention_emitter import AttentionLayer, causal_bias, why_plain
from bone_fx.capture.decoder.kv_cache import PassThroughCache
from bone_fx.capture.decoder.layer_number import LayerNumber
from bone_fx.capture.decoder.pasts import Pasts
from bone_fx.errors import CaptureError
from bone_fx.lower.stamp import DOMAIN

PRESENT = "Present"


@dataclass(frozen=True)
class Computed:
    """What the attention of one layer was found to compute.

    Attributes:
        heads: Number of query heads.
        groups: Number of query heads that share a key/value head which the model repeats before it
            puts it into the cache.
        scale: Factor of the scores.
        bias: What is added to the scores of keys by head and position, [H, M], up to a number
            for each query; None for nothing.
    """

    heads: int
    groups: int
    scale: float
    bias: Tensor | None


@dataclass
class OwnAttention:
    """What is known about the attention of a model that computes its own.

    Attributes:
        computed: What was found, by layer; empty before the first trace.
        plain: Why it is to be written in plain operators.
    """

    computed: dict[int, Computed] = field(default_factory=dict)
    plain: str | None = None


class JoiningCache(PassThroughCache):
    """Gives a model its past and new keys and values as one.

    Args:
        pasts: Past key and value of each layer.
        own: What is known about the attention.
        mask_BT: The attention mask, 1 for tokens and 0 for padding on the right.
        lengths: Index of the last valid token of each row, and T, both int32 tensors.
        tokens: S.
        total: T.
        on_update: Is told layer, keys [B, K, S, D] and values of each update.
    """

    def __init__(
        self,
        pasts: Pasts,
        own: OwnAttention,
        mask_BT: Tensor,
        lengths: tuple[Tensor, Tensor],
        *,
        tokens: int | SymInt,
        on_update: Callable[[int, Tensor, Tensor], None],
    ) -> None:
        total = mask_BT.shape[1]
        super().__init__(pasts, query_offset=total - tokens, total=total)
        self._own = own
        self._mask_BT = mask_BT
        self._lengths = lengths
        self._tokens = tokens
        self._on_update = on_update
        self._biases: list[tuple[Tensor | None, Tensor]] = []

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int | LayerNumber,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, [B, K, T, D]."""
        layer = layer_idx.value if isinstance(layer_idx, LayerNumber) else layer_idx
        if layer in self.presents or not 0 <= layer < len(self.pasts):
            raise CaptureError(
                f"layer {layer} updates the key/value cache twice or out of range",
                expected=f"one update for each of {len(self.pasts)} layers",
            )
        known = self._own.computed.get(layer)
        groups = 1 if known is None else known.groups
        new = [x[:, ::groups] if groups > 1 else x for x in (key_states, value_states)]
        self._on_update(layer, new[0], new[1])
        pasts = self.pasts.own(layer)
        bias = None if known is None else self._bias(known.bias, new[0].dtype)
        extra = [*self._lengths, *([] if bias is None else [bias])]
        present = [
            self._mark(x, [past, *(extra if kind == 0 else [])], layer, kind)
            for kind, (past, x) in enumerate(zip(pasts, new, strict=True))
        ]
        self.presents[layer] = (present[0], present[1])
        key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in present)
        return key, value

    def _mark(self, new: Tensor, others: list[Tensor], layer: int, kind: int) -> Tensor:
        batch, heads, _, size = new.shape
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{PRESENT}",
            (new, *others),
            {"layer": layer, "kind": kind},
            dtype=new.dtype,
            shape=(batch, heads, self._total, size),
            version=1,
        )

    def _bias(self, table_HM: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, made once for all layers that have it."""
        for known, bias in self._biases:
            if known is table_HM:
                return bias
        if self._own.plain is not None:
            made = causal_bias(self._mask_BT, self._tokens, window=None, dtype=dtype)
            if table_HM is not None:  # keys are joined with their padding: [B, T, H] by position
                position_BT = (torch.cumsum(self._mask_BT, dim=1) - 1).clamp(min=0)
                by_key = functional.embedding(position_BT, table_HM.t().contiguous())
                made = made + by_key.transpose(1, 2)[:, :, None]
        elif table_HM is None:
            return None
        else:
            made = self._of_compact_keys(table_HM)
        self._biases.append((table_HM, made))
        return made

    def _of_compact_keys(self, table_HM: Tensor) -> Tensor:
        """The bias [1, H, S, T] for GroupQueryAttention, whose keys stand at their positions."""
        zero, one = (torch.tensor([n], dtype=torch.int32) for n in (0, 1))
        heads = int(table_HM.shape[0])
        cut_HT = torch.onnx.ops.symbolic(
            "Slice",
            (table_HM, zero, self._lengths[1], one),
            dtype=table_HM.dtype,
            shape=(heads, self._total),
            version=13,
        )
        return cut_HT[None, :, None].expand(1, heads, self._tokens, self._total)


def same_tables(found: Mapping[int, Computed]) -> dict[int, Computed]:
    """The same with one tensor for equal tables."""
    tables: list[Tensor] = []
    result = {}
    for layer, computed in found.items():
        table = computed.bias
        if table is not None:
            known = next((t for t in tables if torch.equal(t, table)), None)
            if known is None:
                tables.append(table)
            table = table if known is None else known
        result[layer] = Computed(computed.heads, computed.groups, computed.scale, table)
    return result


def facts_of(
    layer: int, key: Tensor, value: Tensor, own: OwnAttention, unfused: str | None
) -> AttentionLayer:
    """What the attention of a layer needs, as far as it is known.

    Args:
        layer: Number of the layer.
        key: Its new keys [B, K, S, D].
        value: Its new values.
        own: What is known.
        unfused: Why no layer may be written as the operator; None where it may.
    """
    heads, size, value_size = int(key.shape[1]), int(key.shape[3]), int(value.shape[3])
    known = own.computed.get(layer)
    return AttentionLayer(
        layer=layer,
        heads=heads if known is None else known.heads,
        kv_heads=heads,
        key_size=size,
        value_size=value_size,
        scale=size**-0.5 if known is None else known.scale,
        window=None,
        softcap=0.0,
        plain=unfused or why_plain(size, value_size),
    )
