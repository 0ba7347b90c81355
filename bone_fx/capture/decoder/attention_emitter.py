"""Attention: the function that transformers calls while a decoder is captured.

It emits one GroupQueryAttention a layer, with past and present, straight into the graph. Where the
operator cannot take a head size it writes the attention out in ATen operators with a concatenated
cache: slower, and right.

Shape letters: B batch, H query heads, K key/value heads, S new tokens, P past tokens, T = P + S, D
head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, nn

from bone_fx.capture.decoder.kv_cache import PassThroughCache, concatenated
from bone_fx.capture.decoder.masks import MaskKind, UnknownMask
from bone_fx.capture.decoder.ort_operators import Attribute, group_query_attention
from bone_fx.capture.trace.replacements import configured
from bone_fx.errors import CaptureError

IMPLEMENTATION = "bone_fx_decoder"
HEAD_SIZE_MULTIPLE = 8

# Arguments of the attention interface that change nothing for one text a row without dropout.
WITHOUT_EFFECT = frozenset(
    {
        "dropout", "position_ids", "cache_position", "use_cache", "output_attentions",
        "deterministic",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_hidden_states",
        "return_dict", "layer_idx", "sliding_window", "output_router_logits",
    }
)  # fmt: skip


@dataclass(frozen=True)
class AttentionLayer:
    """What the attention of one layer needs.

    Attributes:
        layer: Number of the layer in the cache.
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        key_size: Columns of one key head.
        value_size: Columns of one value head.
        scale: Factor of the scores.
        window: Number of keys a token sees, itself included; None for all.
        softcap: Limit of the scores; 0 for none.
        plain: Why the operator cannot take this layer; None where it does.
    """

    layer: int
    heads: int
    kv_heads: int
    key_size: int
    value_size: int
    scale: float
    window: int | None
    softcap: float
    plain: str | None


def why_plain(key_size: int, value_size: int) -> str | None:
    """Why GroupQueryAttention cannot take heads of this size; None if it can."""
    if key_size != value_size:
        return f"keys of {key_size} and values of {value_size} columns a head"
    if key_size % HEAD_SIZE_MULTIPLE:
        return f"head size {key_size} is not a multiple of {HEAD_SIZE_MULTIPLE}"
    return None


class AttentionEmitter:
    """Stands in `ALL_ATTENTION_FUNCTIONS` for one forward of a model.

    Args:
        cache: The cache that this forward was given.
        mask_BT: The attention mask, 1 for tokens and 0 for padding on the right.
        lengths: Index of the last valid token of each row, and T, both int32 tensors.
        layers: Receives the description of each layer's attention.
        unfused: Why no layer may be written as the operator; None where it may.
    """

    def __init__(
        self,
        cache: PassThroughCache,
        mask_BT: Tensor,
        lengths: tuple[Tensor, Tensor],
        layers: list[AttentionLayer],
        unfused: str | None = None,
    ) -> None:
        self._unfused = unfused
        self.called = False
        self.layers = layers
        self.cache = cache
        self._mask_BT = mask_BT
        self._lengths = lengths
        self._biases: dict[int | None, Tensor] = {}

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: object,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attends; query [B, H, S, D], key and value [B, K, S, D], output [B, S, H, D]."""
        name = type(module).__name__
        self.called = True
        self._refuse_unknown(name, attention_mask, is_causal, kwargs)
        assert isinstance(attention_mask, MaskKind)
        layer, past = self.cache.take(key, value, name)
        facts = AttentionLayer(
            layer=layer,
            heads=int(query.shape[1]),
            kv_heads=int(key.shape[1]),
            key_size=int(key.shape[3]),
            value_size=int(value.shape[3]),
            scale=float(query.shape[3] ** -0.5 if scaling is None else scaling),
            window=attention_mask.window,
            softcap=float(softcap or 0.0),
            plain=self._unfused or why_plain(int(key.shape[3]), int(value.shape[3])),
        )
        self.layers.append(facts)
        attend = self._fused if facts.plain is None else self._plain
        output, present = attend(facts, (query, key, value), past, s_aux)
        self.cache.presents[layer] = present
        return output, None

    @staticmethod
    def _refuse_unknown(
        name: str, mask: object, is_causal: bool | None, kwargs: dict[str, Any]
    ) -> None:
        unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in WITHOUT_EFFECT)
        if unknown:
            raise CaptureError(
                f"{name} passes arguments to its attention that have no counterpart",
                found=", ".join(unknown),
            )
        if is_causal is False:
            raise CaptureError(f"{name} attends to later tokens", expected="a causal decoder")
        if isinstance(mask, UnknownMask):
            raise mask.reason
        if not isinstance(mask, MaskKind):
            raise CaptureError(
                f"{name} uses a mask of its own",
                expected="a mask made by transformers' masking functions",
                found=type(mask).__name__,
            )

    def _fused(
        self,
        facts: AttentionLayer,
        qkv: tuple[Tensor, Tensor, Tensor],
        past: tuple[Tensor, Tensor],
        sinks: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch, _, tokens, _ = qkv[0].shape
        query, key, value = (x.transpose(1, 2).reshape(batch, tokens, -1) for x in qkv)
        attributes: dict[str, Attribute] = {
            "num_heads": facts.heads,
            "kv_num_heads": facts.kv_heads,
            "scale": facts.scale,
        }
        if facts.window is not None:
            attributes["local_window_size"] = facts.window
        if facts.softcap:
            attributes["softcap"] = facts.softcap
        output, present_key, present_value = group_query_attention(
            query,
            key,
            value,
            past,
            self._lengths,
            total=self._mask_BT.shape[1],
            head_sink=sinks,
            attributes=attributes,
        )
        return output.view(batch, tokens, facts.heads, -1), (present_key, present_value)

    def _plain(
        self,
        facts: AttentionLayer,
        qkv: tuple[Tensor, Tensor, Tensor],
        past: tuple[Tensor, Tensor],
        sinks: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query = qkv[0]
        present_key, present_value = concatenated(past, qkv[1:])
        groups = facts.heads // facts.kv_heads
        key = present_key.repeat_interleave(groups, dim=1) if groups > 1 else present_key
        value = present_value.repeat_interleave(groups, dim=1) if groups > 1 else present_value
        scores = torch.matmul(query, key.transpose(2, 3)) * facts.scale
        if facts.softcap:
            scores = torch.tanh(scores / facts.softcap) * facts.softcap
        scores = scores + self._bias(facts.window, query)
        if sinks is not None:
            column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
            scores = torch.cat((scores, column.to(scores.dtype)), dim=-1)
        weights = torch.softmax(scores.float(), dim=-1).to(query.dtype)
        if sinks is not None:
            weights = weights[..., :-1]
        return torch.matmul(weights, value).transpose(1, 2), (present_key, present_value)

    def _bias(self, window: int | None, query: Tensor) -> Tensor:
        if window not in self._biases:
            self._biases[window] = causal_bias(
                self._mask_BT, query.shape[2], window=window, dtype=query.dtype
            )
        return self._biases[window]


def causal_bias(
    mask_BT: Tensor, tokens: int | SymInt, *, window: int | None, dtype: torch.dtype
) -> Tensor:
    """What hides later tokens, padding and what is out of the window, [B, 1, S, T].

    Args:
        mask_BT: The attention mask, 1 for tokens and 0 for padding.
        tokens: S.
        window: Number of keys a token sees, itself included; None for all.
        dtype: Dtype of the result.
    """
    position_BT = torch.cumsum(mask_BT, dim=1) - 1
    first = mask_BT.shape[1] - tokens
    key_position = position_BT[:, None, None, :]
    query_position = position_BT[:, first:][:, None, :, None]
    allowed = (mask_BT > 0)[:, None, None, :] & (key_position <= query_position)
    if window is not None:
        allowed = allowed & (query_position - key_position < window)
    zero = torch.zeros((), dtype=dtype)
    lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype)
    return torch.where(allowed, zero, lowest)


@contextmanager
def attention_interface(
    model: nn.Module, attend: Callable[..., Any], mask: Callable[..., Any]
) -> Iterator[None]:
    """While open, a model's attention is `attend`, and `mask` makes its masks.

    Args:
        model: A transformers model; the configurations of all its parts are switched, and switched
            back.
        attend: What transformers calls for each attention.
        mask: What transformers calls for each mask.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attentions, masks = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    attentions.register(IMPLEMENTATION, attend)
    masks.register(IMPLEMENTATION, mask)
    try:
        with configured(model, "_attn_implementation_internal", IMPLEMENTATION):
            yield
    finally:
        type(attentions)._global_mapping.pop(IMPLEMENTATION, None)
        type(masks)._global_mapping.pop(IMPLEMENTATION, None)
