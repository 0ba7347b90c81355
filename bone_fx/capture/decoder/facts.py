"""What a trace of a decoder has to know beforehand, from one run of the model on a short text.

The model runs as it is written, equal layers once. A stand-in for attention notes whether it is
called, and an empty cache what is put into it. No value matters, so weights may be fake, and what
takes most of the time gives tensors without values.

Shape letters: B batch, H query heads, S new tokens, D columns of a value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.capture.decoder.attention_emitter import (
    AttentionEmitter,
    AttentionLayer,
    attention_interface,
)
from bone_fx.capture.decoder.experts import experts_interface
from bone_fx.capture.decoder.interface import (
    BATCH,
    NEW,
    KeyValueShape,
    model_inputs,
    shapes_from,
)
from bone_fx.capture.decoder.norms import recognise_norms
from bone_fx.capture.decoder.own_attention import ConcatenatingCache
from bone_fx.capture.decoder.pasts import Pasts
from bone_fx.capture.decoder.stamping.layers import equal_layers_once
from bone_fx.capture.stamping.layers import LayerList, layer_lists
from bone_fx.capture.trace.replacements import evaluating, forward_replaced, without_remarks
from bone_fx.errors import BoneFxError, CaptureError, first_line


@dataclass(frozen=True)
class ModelFacts:
    """What a trace has to know of a model beforehand.

    Attributes:
        dtype: Dtype of weights, cache and logits.
        shapes: Heads, key columns and value columns of the cache, by layer.
        own_attention: Whether the model attends by itself and does not ask transformers.
        layers: Its lists of layers, with what makes two of them equal.
    """

    dtype: torch.dtype
    shapes: tuple[KeyValueShape, ...]
    own_attention: bool
    layers: list[LayerList]


def find_facts(model: nn.Module, config: Any) -> ModelFacts:
    """Runs a model on a short text and says what a trace has to know of it.

    Args:
        model: The model; it is as it was when this returns.
        config: The configuration of its text part.

    Raises:
        CaptureError: The configuration states no sizes, or the model cannot be run.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    attended = False

    def attend(_: nn.Module, query: Tensor, __: Tensor, value: Tensor, *_a: Any, **_k: Any) -> Any:
        nonlocal attended
        attended = True
        batch, heads, tokens, _size = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[3]), None

    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    shapes = shapes_from(config)
    lists = layer_lists(model, len(shapes))
    ids = torch.zeros(BATCH, NEW, dtype=torch.long)
    mask, positions = torch.ones_like(ids), torch.arange(NEW).expand(BATCH, -1)
    none = torch.empty(0, dtype=dtype)  # torch.cat passes over it, whatever shape the others have
    pasts = Pasts([(none, none)], [0] * len(shapes), shared=False)
    layers: list[AttentionLayer] = []
    cache = ConcatenatingCache(pasts, query_offset=0, total=NEW, heads=0, layers=layers)
    emitter = AttentionEmitter(cache, mask, (mask, mask), layers)
    # Attention of the model's own computes with its masks, so they are real ones.
    masks = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    try:
        with (
            torch.no_grad(),
            evaluating(model),
            without_remarks(),
            experts_interface(model, lambda _experts, hidden, *_: hidden),
            attention_interface(model, attend, masks),
            _modules_of_shapes(model),
            equal_layers_once(lists, lambda: emitter, traced=False),
        ):
            model(**model_inputs(model.forward, ids, mask, positions, cache))
    except Exception as error:  # whatever a model's own code may raise
        raise not_captured(model, error) from error
    for layer in layers:
        shapes[layer.layer] = (layer.kv_heads, layer.key_size, layer.value_size)
    return ModelFacts(dtype, tuple(shapes), not attended, lists)


@contextmanager
def _modules_of_shapes(model: nn.Module) -> Iterator[None]:
    """While open, products and norms, most of a model's operators, give tensors of their shapes."""
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear:
                stack.enter_context(forward_replaced(module, MethodType(_product, module)))
        for path in recognise_norms(model):
            stack.enter_context(forward_replaced(model.get_submodule(path), _same))
        yield


def _product(linear: nn.Linear, x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], linear.out_features)


def _same(x: Tensor) -> Tensor:
    return x


def not_captured(model: nn.Module, error: Exception) -> BoneFxError:
    """What a person is told about a model whose own code failed."""
    if isinstance(error, BoneFxError):
        return error
    return CaptureError(
        f"{type(model).__name__} cannot be captured as a decoder: {first_line(error)}",
        expected="a forward without decisions that depend on the data",
    )
