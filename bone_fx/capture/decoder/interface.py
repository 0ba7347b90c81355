"""Inputs and outputs of a decoder graph: names, axes and examples for its trace.

The names are those of onnxruntime-genai.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from bone_fx.capture.trace.config_sizes import size_in
from bone_fx.errors import CaptureError

BATCH, NEW, PAST = 2, 3, 7
KINDS = ("key", "value")
KeyValueShape = tuple[int, int, int]
"""Heads, key columns and value columns of a layer's cache."""


def shapes_from(config: Any) -> list[KeyValueShape]:
    """Heads, key columns and value columns of each layer: a first guess from the configuration.

    Raises:
        CaptureError: The configuration does not say how many layers and heads there are, or has
            something else than a number there.
    """
    layers, heads = size_in(config, "num_hidden_layers"), size_in(config, "num_attention_heads")
    hidden = size_in(config, "hidden_size")
    size = size_in(config, "head_dim") or (hidden // heads if hidden and heads else None)
    if layers is None or heads is None or size is None:
        raise CaptureError(
            f"{type(config).__name__} does not say how many layers and heads the model has",
            expected="num_hidden_layers, num_attention_heads and hidden_size",
        )
    kv_heads = size_in(config, "num_key_value_heads") or heads
    return [(kv_heads, size, size)] * layers


def input_names(layers: int) -> list[str]:
    """The inputs in order."""
    pasts = [f"past_key_values.{i}.{kind}" for i in range(layers) for kind in KINDS]
    return ["input_ids", "attention_mask", *pasts]


def output_names(layers: int) -> list[str]:
    """The outputs in order."""
    return ["logits", *(f"present.{i}.{kind}" for i in range(layers) for kind in KINDS)]


def axis_names(layers: int, *, last_token_logits: bool = False) -> dict[str, dict[int, str]]:
    """For each input and output, the names of its dynamic axes by position."""
    names = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "logits": {0: "batch_size"},
    }
    if not last_token_logits:
        names["logits"][1] = "sequence_length"
    for name in input_names(layers)[2:]:
        names[name] = {0: "batch_size", 2: "past_sequence_length"}
    for name in output_names(layers)[1:]:
        names[name] = {0: "batch_size", 2: "total_sequence_length"}
    return names


def dynamic_shapes(pairs: int, horizon: int, *, related: bool) -> dict[str, Any]:
    """The dynamic axes of a trace with so many pairs of pasts.

    Args:
        pairs: Number of pairs of a past key and a past value.
        horizon: Most new tokens.
        related: Whether the graph itself joins past and new tokens, so that the sizes depend on
            each other.
    """
    if related:
        batch: Any = Dim.AUTO
        new: Any = Dim.AUTO
        past: Any = Dim.AUTO
        total: Any = Dim.AUTO
    else:
        batch, new = Dim("batch_size", max=1 << 20), Dim("sequence_length", max=horizon)
        past = Dim("past_sequence_length", max=1 << 30)
        total = Dim("total_sequence_length", max=1 << 30)
    return {
        "input_ids": {0: batch, 1: new},
        "attention_mask": {0: batch, 1: total},
        "past_key_values": [{0: batch, 2: past}] * (2 * pairs),
    }


def example_inputs(
    shapes: list[KeyValueShape], dtype: torch.dtype, mode: FakeTensorMode | None
) -> dict[str, Any]:
    """Inputs for a trace, fake where the model is."""
    with mode or ExitStack():
        pasts = []
        for heads, key, value in shapes:
            pasts.append(torch.zeros(BATCH, heads, PAST, key, dtype=dtype))
            pasts.append(torch.zeros(BATCH, heads, PAST, value, dtype=dtype))
        return {
            "input_ids": torch.zeros(BATCH, NEW, dtype=torch.long),
            "attention_mask": torch.ones(BATCH, PAST + NEW, dtype=torch.long),
            "past_key_values": pasts,
        }


def model_inputs(
    forward: Callable[..., Any],
    input_ids: Tensor,
    attention_mask: Tensor,
    positions: Tensor,
    cache: object,
) -> dict[str, Any]:
    """The arguments of a model's own forward; the positions only where it takes any."""
    takes_positions = "position_ids" in inspect.signature(forward).parameters
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "use_cache": True,
        **({"position_ids": positions} if takes_positions else {}),
    }
