"""ONNX operators that have no ATen counterpart, emitted straight into a graph that is being traced.

Each function stands for one ONNX node. Under tracing it leaves one `onnx_symbolic` node of the
right shape and dtype; run eagerly it gives zeros, so it has no meaning outside a capture.

Shape letters: B batch, S new tokens, P past tokens, T past and new tokens, H query heads, K
key/value heads, D head size, R rotary width (R <= D), M positions in a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bone_fx.lower.symbolic import CONTRIB

OWN = "bone_fx"
"""Domain of nodes that a pass replaces before the translation."""

ONNX_INT32 = 6

Attribute = (
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
)


def simplified_layer_norm(x: Tensor, scale: Tensor, epsilon: float) -> Tensor:
    """Emits SimplifiedLayerNormalization 1, ONNX Runtime's RMS norm over the last axis."""
    attributes: dict[str, Attribute] = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return torch.onnx.ops.symbolic(
        "SimplifiedLayerNormalization",
        (x, scale),
        attributes,
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def rotary_embedding(
    x: Tensor,
    positions_BS: Tensor,
    cos_MR: Tensor,
    sin_MR: Tensor,
    *,
    interleaved: bool,
) -> Tensor:
    """Emits com.microsoft::RotaryEmbedding 1 on `x` [B, H, S, D]; tables are [M, R/2]."""
    heads, head_size = int(x.shape[1]), int(x.shape[3])
    width = 2 * int(cos_MR.shape[1])
    attributes: dict[str, Attribute] = {"interleaved": int(interleaved), "num_heads": heads}
    if width != head_size:
        attributes["rotary_embedding_dim"] = width
    return torch.onnx.ops.symbolic(
        f"{CONTRIB}::RotaryEmbedding",
        (x, positions_BS, cos_MR, sin_MR),
        attributes,
        dtype=x.dtype,
        shape=x.shape,
        version=1,
    )


def rows_by_length(
    tables: tuple[Tensor, Tensor],
    longest_1: Tensor,
    total_1: Tensor,
    total: int | torch.SymInt,
    switch: int,
) -> tuple[Tensor, Tensor]:
    """Emits Greater, Cast, Mul, Squeeze, Range, Add and two Gathers: T rows of each table.

    The longest text decides which. The mask may be wider than the texts: a cache of fixed size is
    fed so. The choice is made on the device, so that a CUDA graph makes it anew in every step.

    Args:
        tables: cos and sin, each [switch + M, R/2]: rows of texts of at most `switch` tokens, then
            those of longer ones.
        longest_1: Tokens of the longest text, as an int32 tensor of one element.
        total_1: T as an int32 tensor of one element.
        total: T, for the shape.
        switch: Number of rows of the first kind.
    """
    limit = torch.tensor([switch], dtype=torch.int32)
    long = torch.onnx.ops.symbolic(
        "Greater", (longest_1, limit), dtype=torch.bool, shape=(1,), version=13
    )
    start = _int32("Mul", _int32("Cast", long, to=ONNX_INT32), limit)
    zero, one = torch.tensor(0, dtype=torch.int32), torch.tensor(1, dtype=torch.int32)
    width = _int32("Squeeze", total_1, shape=())
    rows = _int32("Add", _int32("Range", zero, width, one, shape=(total,)), start, shape=(total,))
    cos, sin = (
        torch.onnx.ops.symbolic(
            "Gather",
            (table, rows),
            dtype=table.dtype,
            shape=(total, table.shape[1]),
            version=13,
        )
        for table in tables
    )
    return cos, sin


def _int32(
    op_type: str,
    *inputs: Tensor,
    shape: tuple[int | torch.SymInt, ...] = (1,),
    **attributes: Attribute,
) -> Tensor:
    return torch.onnx.ops.symbolic(
        op_type, inputs, attributes, dtype=torch.int32, shape=shape, version=13
    )


def rows_at(x_BSH: Tensor, index_B: Tensor) -> Tensor:
    """Emits GatherND 13: one row of each text, [B, 1, H]."""
    batch, _, width = x_BSH.shape
    return torch.onnx.ops.symbolic(
        "GatherND",
        (x_BSH, index_B[:, None, None]),
        {"batch_dims": 1},
        dtype=x_BSH.dtype,
        shape=(batch, 1, width),
        version=13,
    )


def new_tokens(ids_BS: Tensor) -> Tensor:
    """Emits Shape, Expand and ReduceSum: S as an int64 tensor of one element, on the device.

    Counted there, since a size stands on the host and a CUDA graph copies nothing from it.
    """
    axis = torch.tensor([0])
    size, ones = _size(ids_BS, 1), torch.tensor([1])
    row = torch.onnx.ops.symbolic(
        "Expand", (ones, size), dtype=torch.int64, shape=(ids_BS.shape[1],), version=13
    )
    return torch.onnx.ops.symbolic(
        "ReduceSum", (row, axis), {"keepdims": 1}, dtype=torch.int64, shape=(1,), version=13
    )


def total_length(mask_BT: Tensor) -> Tensor:
    """Emits Shape and Cast: T as an int32 tensor of one element, known on the host."""
    return _int32("Cast", _size(mask_BT, 1), to=ONNX_INT32)


def _size(x: Tensor, axis: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "Shape", (x,), {"start": axis, "end": axis + 1}, dtype=torch.int64, shape=(1,), version=15
    )


def group_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    *,
    total: int | torch.SymInt,
    head_sink: Tensor | None,
    attributes: Mapping[str, Attribute],
) -> tuple[Tensor, Tensor, Tensor]:
    """Emits com.microsoft::GroupQueryAttention 1.

    Args:
        query: [B, S, H * D].
        key: [B, S, K * D].
        value: [B, S, K * D].
        past: Key and value, each [B, K, P, D].
        lengths: Index of the last valid token of each row, int32 [B], and T as an int32 tensor of
            one element.
        total: T, for the shape of the present.
        head_sink: [H] attention sinks, or None.
        attributes: The operator's attributes, `num_heads` and `kv_num_heads` among them.

    Returns:
        The output [B, S, H * D] and the present key and value [B, K, T, D].
    """
    inputs: list[Tensor | None] = [query, key, value, *past, *lengths]
    if head_sink is not None:
        inputs += [None, None, None, None, head_sink]
    batch, heads, _, head_size = past[0].shape
    present = (batch, heads, total, head_size)
    output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
        f"{CONTRIB}::GroupQueryAttention",
        inputs,
        dict(attributes),
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=(query.shape, present, present),
        version=1,
    )
    return output, present_key, present_value


def routed_experts(
    hidden_NH: Tensor,
    routing: tuple[Tensor, Tensor],
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    attributes: Mapping[str, Attribute],
) -> Tensor:
    """Emits a mixture of experts with its routing, which a pass turns into com.microsoft::MoE 1.

    Args:
        hidden_NH: [N, H], what the experts read.
        routing: The experts chosen for each token and their weights, both [N, C].
        up: Weight [X, 2 * I, H] and bias [X, 2 * I] of the first product, gate and up in turns.
        down: Weight [X, H, I] and bias [X, H] of the second.
        attributes: Those of MoE.

    Returns:
        [N, H].
    """
    return torch.onnx.ops.symbolic(
        f"{OWN}::RoutedExperts",
        (hidden_NH, *routing, *up, *down),
        dict(attributes),
        dtype=hidden_NH.dtype,
        shape=hidden_NH.shape,
        version=1,
    )
