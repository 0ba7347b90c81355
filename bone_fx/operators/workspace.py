"""Memory that is used again from call to call.

A step makes and drops tensors of the size of a weight for every layer, and one of the size of the
logits. On a CPU the allocator gives that memory back to the system and takes it again, page by
page.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from bone_fx.operators.plain import on_plain_cpu

LARGEST = 64 << 20
"""Bytes of the largest buffer that is kept; what is larger costs little beside its product."""

LARGEST_RESULT = 256 << 20
"""Bytes of the largest result whose memory is kept."""

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
    if not _keeps(shape, like, LARGEST):
        return None
    buffers = _OWN.__dict__
    key = f"{slot} {like.dtype}"
    size = math.prod(shape)
    kept: Tensor | None = buffers.get(key)
    if kept is None or kept.numel() < size:
        kept = buffers[key] = torch.empty(size, dtype=like.dtype)
    return kept[:size].view(shape)


def result(slot: str, like: Tensor) -> Tensor:
    """An empty tensor like another one, in the memory of the last such result if all let go of it.

    For what an operator returns and nobody is expected to keep, such as the gradient of the
    logits: whoever does keep it keeps the memory, and the next result gets its own. Tried with
    torch 2.13.0, whose count of a storage's holders is not public.

    Args:
        slot: What it is for.
        like: A tensor of its shape, dtype and device.
    """
    shape = tuple(like.shape)
    if not like.is_contiguous() or not _keeps(shape, like, LARGEST_RESULT):
        return torch.empty_like(like)
    buffers = _OWN.__dict__
    kept: torch.UntypedStorage | None = buffers.get(slot)
    free = kept is not None and torch._C._storage_Use_Count(kept._cdata) == 1
    if kept is None or not free or kept.nbytes() != math.prod(shape) * like.element_size():
        kept = buffers[slot] = torch.empty_like(like).untyped_storage()
    return torch.empty(0, dtype=like.dtype).set_(kept, 0, like.size(), like.stride())


def _keeps(shape: tuple[int, ...], like: Tensor, largest: int) -> bool:
    return math.prod(shape) * like.element_size() <= largest and on_plain_cpu(like)
