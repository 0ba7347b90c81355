"""Buffers for weights that live within one operator call, kept from call to call.

A step of BAT makes and drops two tensors of the size of a weight for every layer. On a CPU the
allocator gives that memory back to the system and takes it again, page by page.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor, nn

LARGEST = 64 << 20
"""Bytes of the largest buffer that is kept; what is larger costs little beside its product."""

_OWN = threading.local()


def workspace(slot: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """A buffer to compute into, or None where one is of no use.

    Its content lasts until the next call with the same slot on the same thread.

    Args:
        slot: What it is for.
        shape: Its shape.
        like: A tensor of its dtype and device. Only plain tensors on a CPU have buffers, outside
            traces: a trace must not see a tensor that outlives it.
    """
    size = math.prod(shape) * like.element_size()
    plain = type(like) in (Tensor, nn.Parameter) and like.device.type == "cpu"
    if not plain or size > LARGEST or torch._C._len_torch_dispatch_stack():
        return None
    buffers = _OWN.__dict__
    key = f"{slot} {like.dtype}"
    kept: Tensor | None = buffers.get(key)
    if kept is None or kept.numel() < math.prod(shape):
        kept = buffers[key] = torch.empty(math.prod(shape), dtype=like.dtype)
    return kept[: math.prod(shape)].view(shape)
