"""Attention that a model computes by itself, without transformers' attention interface.

Such a model (bloom, falcon) is traced as it is, with masks and biases that its own code makes and a
cache that concatenates: past and new keys and values in plain operators.

Shape letters: B batch, K key/value heads, S new tokens, P past tokens, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from bone_fx.capture.decoder.attention_emitter import AttentionLayer
from bone_fx.capture.decoder.kv_cache import PassThroughCache, concatenated
from bone_fx.capture.decoder.pasts import Pasts
from bone_fx.capture.stamping.layer_number import LayerNumber

OWN_ATTENTION = "the model computes its attention by itself: it is written out"

aten = torch.ops.aten


class LeftPadding:
    """A past whose padding is moved to its left end, so that neighbours are neighbours in slots.

    A graph is fed prompts padded on the right, and what is generated comes behind the padding. A
    model whose mask of its own has a window counts the slots of its cache, padding included; with
    the padding before all tokens it counts tokens, as in transformers' own batches.

    Args:
        mask_BP: The attention mask of the past, 1 for tokens and 0 for padding.
    """

    def __init__(self, mask_BP: Tensor) -> None:
        # Counted on the device: sizes stand on the host, and a CUDA graph copies nothing from it.
        padding_BP = 1 - mask_BP
        padding_B1 = padding_BP.sum(1, keepdim=True)
        token_BP = padding_B1 + torch.cumsum(mask_BP, 1) - 1
        self._slot_BP = torch.where(mask_BP > 0, token_BP, torch.cumsum(padding_BP, 1) - 1)
        slot_BP = torch.cumsum(torch.ones_like(mask_BP), 1) - 1
        self.mask_BP = (slot_BP >= padding_B1).to(mask_BP.dtype)

    def moved(self, past_BKPD: Tensor) -> Tensor:
        """Past keys or values, padding first."""
        return past_BKPD.scatter(2, self._slot_BP[:, None, :, None].expand_as(past_BKPD), past_BKPD)


def counts_slots(model: nn.Module) -> bool:
    """Whether a model keeps a mask of its own that hides more than later slots: a window's."""
    return any(
        mask.dtype == torch.bool
        and mask.dim() >= 2
        and mask.shape[-1] == mask.shape[-2]
        and not torch.equal(mask, torch.ones_like(mask).tril())
        for mask in model.buffers()
    )


class ConcatenatingCache(PassThroughCache):
    """Gives a model its past and new keys and values as one.

    Args:
        pasts: Past key and value of each layer.
        query_offset: Number of tokens before the new ones.
        total: Number of tokens, new ones included.
        heads: Number of query heads.
        layers: Receives the description of each layer's attention.
        padding: How the past is ordered for a model that counts slots; None for as it is kept.
    """

    def __init__(
        self,
        pasts: Pasts,
        *,
        query_offset: int | SymInt,
        total: int | SymInt,
        heads: int,
        layers: list[AttentionLayer],
        padding: LeftPadding | None = None,
    ) -> None:
        super().__init__(pasts, query_offset=query_offset, total=total)
        self._heads = heads
        self._padding = padding
        self._layers = layers

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int | LayerNumber,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor]:
        """Past and new keys and values, [B, K, P + S, D]."""
        new = super().update(key_states, value_states, layer_idx)
        layer, past = self.take(*new, "the model")
        size = int(key_states.shape[3])
        self._layers.append(
            AttentionLayer(
                layer=layer,
                heads=self._heads,
                kv_heads=int(key_states.shape[1]),
                key_size=size,
                value_size=int(value_states.shape[3]),
                scale=float(size**-0.5),
                window=None,
                softcap=0.0,
                plain=OWN_ATTENTION,
            )
        )
        self.presents[layer] = concatenated(past, new)
        if self._padding is None:
            return self.presents[layer]
        key, value = past
        return concatenated((self._padding.moved(key), self._padding.moved(value)), new)


def compute_bfloat16_in_float32(graph: Graph) -> None:
    """Rounds to bfloat16 what a graph multiplies in it, in place: ONNX Runtime's CPU cannot.

    Before: `y: bfloat16 = mul(slopes: bfloat16, positions)` (ALiBi in falcon)
    After:  `y: bfloat16 = to(mul(to(slopes, float32), to(positions, float32)), bfloat16)`
    """
    for node in graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        if node.meta["val"].dtype != torch.bfloat16:
            continue
        with graph.inserting_before(node):
            wide = [
                _call(graph, aten.to.dtype, x, torch.float32) if isinstance(x, Node) else x
                for x in node.args
            ]
            product = _call(graph, aten.mul.Tensor, *wide)
            rounded = _call(graph, aten.to.dtype, product, torch.bfloat16)
        node.replace_all_uses_with(rounded)
        graph.erase_node(node)


def _call(graph: Graph, target: Any, *args: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda n: n.meta["val"]))
    return node
