"""Memory that a thread uses again, and copies that go through it.

A page that a process has not touched yet costs more time than what is computed in it, so what a
thread computes step by step lies in the same few pages.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LARGEST = 16 << 20
"""More bytes than this are given back to the system after use."""


class _Stack(threading.local):
    """A thread's buffers: the n-th belongs to the n-th of the uses that are open."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.open = 0


_stack = _Stack()


@contextmanager
def scratch(shape: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
    """A contiguous CPU tensor with any content, for use inside the block only.

    Args:
        shape: Its shape.
        dtype: Its dtype.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    level, _stack.open = _stack.open, _stack.open + 1
    try:
        yield _buffer(level, nbytes)[:nbytes].view(dtype).view(tuple(shape))
    finally:
        _stack.open = level


def _buffer(level: int, nbytes: int) -> Tensor:
    if nbytes > LARGEST:
        return torch.empty(nbytes, dtype=torch.uint8)
    buffers = _stack.buffers
    while len(buffers) <= level:
        buffers.append(torch.empty(0, dtype=torch.uint8))
    if buffers[level].numel() < nbytes:
        buffers[level] = torch.empty(nbytes, dtype=torch.uint8)
    return buffers[level]


@contextmanager
def contiguous(out: Tensor) -> Iterator[Tensor]:
    """A contiguous tensor to compute into, whose content `out` has after the block.

    Args:
        out: Of any strides; if it is contiguous, it is what the block gets.
    """
    if out.is_contiguous():
        yield out
        return
    with scratch(out.shape, out.dtype) as values:
        yield values
        put(values, out)


def put(values: Tensor, out: Tensor) -> None:
    """Copy values of one dtype into a tensor of any strides.

    PyTorch (2.13) transposes in blocks only from one contiguous matrix to another; anything else
    takes five times as long. So a matrix that goes to a transposed place is turned first.

    Args:
        values: Contiguous.
        out: Of the same shape and dtype.
    """
    if out.dim() == 2 and out.stride(0) == 1 < out.stride(1) and not out.is_contiguous():
        with scratch(out.shape[::-1], out.dtype) as transposed:
            transposed.copy_(values.t())
            out.t().copy_(transposed)
    else:
        out.copy_(values)
