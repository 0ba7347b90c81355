"""A file of weights that is written from front to back, past the page cache if it is large.

Pages that hold what was written push out pages of the source before they are read, and cost the
processor about as much as hashing the bytes: a seventh of an export of Llama-3-8B's shape (42
against 36 s of two cores for 4 layers). A file that is small beside memory is left in the cache: it
is read next.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

ALIGNMENT = 4096
"""Direct writes start and end at multiples of this, in the file and in memory."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)  # macOS has none
_SHARE_OF_MEMORY = 8


class OutputFile:
    """An open file.

    Attributes:
        end: Number of bytes written.
    """

    def __init__(self, descriptor: int, direct: int | None) -> None:
        """Use `output_file`."""
        self.end = 0
        self._descriptor = descriptor
        self._direct = direct

    def write(self, content: Tensor) -> None:
        """Write the bytes that come next.

        Args:
            content: uint8, one dimension. Whole pages go past the cache if memory and file have the
                same remainder by `ALIGNMENT` (`aligned`).

        Raises:
            OSError: The disk is full, or fails.
        """
        start, stop = self.end, self.end + content.numel()
        first, last = -(-start // ALIGNMENT) * ALIGNMENT, stop // ALIGNMENT * ALIGNMENT
        view = memoryview(content.numpy())  # type: ignore[arg-type]  # see safetensors_file._buffer
        congruent = (content.data_ptr() - start) % ALIGNMENT == 0
        if self._direct is not None and congruent and first < last:
            self._put(view[: first - start], start)
            self._put_directly(view[first - start : last - start], first)
            self._put(view[last - start :], last)
        else:
            self._put(view, start)
        self.end = stop

    def _put(self, view: memoryview, offset: int) -> None:
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count

    def _put_directly(self, view: memoryview, offset: int) -> None:
        assert self._direct is not None
        while view:
            try:
                count = os.pwrite(self._direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                count = 0
            if count % ALIGNMENT or not count:  # a file system that does not do this after all
                self._put(view, offset)
                return
            view, offset = view[count:], offset + count


@contextmanager
def output_file(path: Path, size: int) -> Iterator[OutputFile]:
    """Open a file to write; what it held is gone.

    Args:
        path: The file.
        size: How many bytes are going to be written, about.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    direct = _open_directly(path) if size > _memory() // _SHARE_OF_MEMORY else None
    try:
        yield OutputFile(descriptor, direct)
    finally:
        os.close(descriptor)
        if direct is not None:
            os.close(direct)


def buffer_of(nbytes: int) -> Tensor:
    """Memory for so many bytes wherever they go in a file."""
    return torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8)


def aligned(buffer: Tensor, nbytes: int, offset: int) -> Tensor:
    """Bytes in a buffer, or in a new one if it is too short, to be written at an offset directly.

    Args:
        buffer: From `buffer_of`, or the result of an earlier call.
        nbytes: How many.
        offset: Where they go in the file.
    """
    if buffer.untyped_storage().nbytes() < nbytes + ALIGNMENT:
        buffer = buffer_of(nbytes)
    start = (offset - buffer.untyped_storage().data_ptr()) % ALIGNMENT
    return buffer.as_strided((nbytes,), (1,), start)


def _open_directly(path: Path) -> int | None:
    if not _DIRECT:
        return None
    try:
        return os.open(path, os.O_WRONLY | _DIRECT)
    except OSError:
        return None


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
