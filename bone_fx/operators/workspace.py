"""Memory that is used again from call to call.

A step makes and drops tensors of the size of a weight for every layer. On a CPU the allocator gives
that memory back to the system and takes it again, page by page.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from bone_fx.operators.plain import on_plain_cpu

LARGEST = 64 << 20
"""Bytes of the largest buffer that is kept."""


class _Buffers(threading.local):
    """The buffers of a thread, by slot and dtype."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}


_BUFFERS = _Buffers()


def workspace(slot: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """A buffer to compute into, or None where one is of no use.

    Its content lasts until the next call with the same slot on the same thread.

    Args:
        slot: What it is for.
        shape: Its shape.
        like: A tensor of its dtype and device. Only plain tensors on a CPU have buffers, outside
            traces: a trace must not see a tensor that outlives it. Nor is there one under
            `torch.inference_mode`: what is made there cannot be written to anywhere else.
    """
    size = math.prod(shape)
    if size * like.element_size() > LARGEST or not on_plain_cpu(like):
        return None
    if torch.is_inference_mode_enabled():
        return None
    buffers, key = _BUFFERS.kept, (slot, like.dtype)
    kept = buffers.get(key)
    if kept is None or kept.numel() < size:
        kept = buffers[key] = torch.empty(size, dtype=like.dtype)
    return kept[:size].view(shape)
