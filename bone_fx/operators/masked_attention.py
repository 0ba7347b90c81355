"""`bone_fx::attention`: scaled dot product attention that looks at what it is given first.

A trace holds for every batch, so its masks are tensors. Most batches need none: every token of an
encoder sees every token, or the mask is the triangle that `is_causal` stands for. PyTorch's kernels
then skip what is hidden and keep no mask for backward (transformers looks at its masks for the same
reason, `masking_utils`). What a needed mask adds to the scores is made once for all layers. What is
hidden weighs zero either way.

Grouped keys and values are read as they are where the kernels take them. PyTorch's (2.13) for CUDA
do in half precision, without a mask, for heads up to 256; they would form the scores otherwise.

Shapes: B batch, H heads, S queries, T keys, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from bone_fx.operators.library import register
from bone_fx.operators.plain import is_plain

LARGEST_HEAD = 256
"""Features of a head, of PyTorch's flash kernel."""


class _Seen(NamedTuple):
    """Properties of a mask, of the version that was looked at.

    Attributes:
        version: Of the mask.
        needed: Whether it hides anything but what comes later.
        is_causal: Whether it hides what comes later, and nothing else.
        added: The mask as it is added to the scores, by their dtype.
    """

    version: int
    needed: bool
    is_causal: bool
    added: dict[torch.dtype, Tensor]


_SEEN = WeakTensorKeyDictionary()
"""Masks of the last call: the layers of a model share one, and to look at it waits for a GPU."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, with the same arguments.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, H, T, D]`, or fewer heads with `enable_gqa`.
        value: `[B, H, T, D]`, the same.
        mask: What may be seen (bool) or is added to the scores, broadcast to `[B, H, S, T]`; None
            for all.
        dropout_p: Probability that a weight is dropped.
        is_causal: Whether a query sees the keys up to its own only, in place of a mask.
        scale: Of the scores; None for `1 / sqrt(D)`.
        enable_gqa: Whether heads of keys and values stand for several of the query.

    Returns:
        `[B, H, S, D]`.
    """
    if mask is not None and _may_be_looked_at(mask):
        seen = _look_at(mask)
        is_causal = seen.is_causal
        mask = _added(mask, query.dtype, seen) if seen.needed else None
    if enable_gqa and not _takes_groups(query, mask):
        times = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
        enable_gqa = False
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


ATTENTION = register(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask=None, float dropout_p=0.0, "
    "bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    attention,
)
"""The operator as it stands in graphs: `torch.ops.bone_fx.attention.default`."""


def forget_masks() -> None:
    """Look at every mask again: one may have changed in ways that leave its version (NumPy's)."""
    if not torch.compiler.is_compiling():
        _SEEN.clear()


def _takes_groups(query: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels of a device read grouped keys and values, instead of forming scores."""
    if not query.is_cuda:
        return query.is_cpu
    autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if autocast else query.dtype
    is_half = dtype in (torch.float16, torch.bfloat16)
    return is_half and mask is None and query.shape[-1] <= LARGEST_HEAD


def _may_be_looked_at(mask: Tensor) -> bool:
    """Whether the mask says what is hidden, and has values and a version that can be read.

    What is made of it under `torch.inference_mode` could not be kept for a training step.
    """
    if mask.dtype != torch.bool or not is_plain(mask) or mask.is_meta:
        return False
    if mask.is_inference() or torch.is_inference_mode_enabled():
        return False
    return not (mask.is_cuda and torch.cuda.is_current_stream_capturing())


def _look_at(mask: Tensor) -> _Seen:
    """What the mask is; each is looked at once, and again when it was changed in place."""
    seen: _Seen | None = _SEEN.get(mask)  # type: ignore[no-untyped-call]
    if seen is None or seen.version != mask._version:
        hides = not bool(mask.all())
        is_causal = hides and _is_triangle(mask)
        seen = _SEEN[mask] = _Seen(mask._version, hides and not is_causal, is_causal, {})
    return seen


def _added(mask: Tensor, dtype: torch.dtype, seen: _Seen) -> Tensor:
    """Zero where the mask lets see, and minus infinity elsewhere."""
    if dtype not in seen.added:
        zeros = torch.zeros_like(mask, dtype=dtype)
        seen.added[dtype] = zeros.masked_fill_(mask.logical_not(), float("-inf"))
    return seen.added[dtype]


def _is_triangle(mask: Tensor) -> bool:
    """Whether each query sees the keys up to its own, in every row of the batch."""
    if mask.dim() < 2 or mask.shape[-2] != mask.shape[-1]:
        return False
    square = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device)
    return torch.equal(mask, square.tril_().expand_as(mask))
