"""Constants computed in bands by a few threads, and written and hashed in the order of the file.

Reading, computing, writing and hashing go on at the same time, in a few buffers that are used again
and again. The bytes do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bone_fx.weights.recipes.recipe import CastOverflowError, Recipe, Transpose
from bone_fx.weights.storage.boxes import Box, bands, sizes, whole
from bone_fx.weights.writing.output_file import aligned, buffer_of, output_file

BAND_BYTES = 8 << 20
"""What is computed, written and hashed at a time, where a recipe can be cut."""

TRANSPOSED_BAND_BYTES = 128 << 20
"""The same for a transposed constant, of whose source every band reads some columns of all rows."""

WORKERS = 2
BUFFERS = WORKERS + 1
"""One for each that computes, one that is written and hashed."""


@dataclass(frozen=True)
class Piece:
    """A constant and where it goes.

    Attributes:
        name: For messages.
        recipe: Where its bytes come from.
        offset: First byte in the stream; what lies between the end of the piece before and here is
            filled with zeros.
    """

    name: str
    recipe: Recipe
    offset: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + math.prod(self.recipe.shape) * self.recipe.dtype.itemsize


Refuse = Callable[[Piece], None]


def write_stream(
    path: Path,
    pieces: Sequence[Piece],
    *,
    refuse: Refuse | None = None,
    advance: Callable[[int], None] | None = None,
    head: bytes = b"",
) -> str:
    """Write constants one after another.

    Args:
        path: The file; what it held is gone.
        pieces: In the order of their offsets, which count from the end of `head`.
        refuse: Told of a constant that a cast makes infinite; raises what a person should read.
        advance: Told the number of bytes of each write.
        head: What comes first.

    Returns:
        SHA-256 of everything written.
    """
    digest = hashlib.sha256()
    size = len(head) + max((piece.end for piece in pieces), default=0)
    with (
        output_file(path, size) as file,
        workers() as pool,
        ThreadPoolExecutor(1) as hashing,
    ):
        cut = list(_cut(pieces))
        idle = [_room(cut) for _ in range(BUFFERS)]
        waiting: deque[tuple[int, Future[Tensor]]] = deque()

        def put(content: Tensor) -> None:
            if not content.numel():
                return
            hashed = hashing.submit(digest.update, content.numpy().data)
            file.write(content)
            hashed.result()
            if advance is not None:
                advance(content.numel())

        def write_first() -> None:
            offset, computed = waiting.popleft()
            band = computed.result()
            put(torch.zeros(offset - file.end, dtype=torch.uint8))
            put(band)
            idle.append(band)

        try:
            if head:
                put(torch.frombuffer(bytearray(head), dtype=torch.uint8))
            for offset, piece, at in cut:
                if not idle:
                    write_first()
                place = len(head) + offset
                computed = pool.submit(_compute, piece, at, place, idle.pop(), refuse)
                waiting.append((place, computed))
            while waiting:
                write_first()
        finally:
            for _, computed in waiting:
                computed.cancel()
    return digest.hexdigest()


@contextmanager
def workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one core each: PyTorch's own threads would stand in each other's way.

    PyTorch keeps the number for each thread, and one for threads to come, which is put back.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


_Band = tuple[int, Piece, Box]
"""The offset of its first byte, the constant and where in it."""


def _cut(pieces: Sequence[Piece]) -> Iterator[_Band]:
    for piece in pieces:
        recipe = piece.recipe
        box = whole(recipe.shape)
        itemsize = recipe.dtype.itemsize
        if not box or not recipe.cuts(0) or 0 in recipe.shape:
            yield piece.offset, piece, box
            continue
        row = math.prod(recipe.shape[1:]) * itemsize
        nbytes = TRANSPOSED_BAND_BYTES if _is_transposed(recipe) else BAND_BYTES
        count = max(1, -(-recipe.shape[0] * row // nbytes))
        rows = -(-recipe.shape[0] // count)
        for band in bands(box, rows * row, itemsize):
            yield piece.offset + band[0][0] * row, piece, band


def _room(bands: Sequence[_Band]) -> Tensor:
    """A buffer that is long enough from the start, so that its pages are not exchanged."""
    longest = max((_nbytes(piece.recipe, at) for _, piece, at in bands), default=0)
    return buffer_of(min(longest, TRANSPOSED_BAND_BYTES))


def _nbytes(recipe: Recipe, at: Box) -> int:
    return math.prod(sizes(at)) * recipe.dtype.itemsize


def _is_transposed(recipe: Recipe) -> bool:
    return isinstance(recipe, Transpose) or any(map(_is_transposed, recipe.inputs()))


def _compute(piece: Piece, at: Box, place: int, buffer: Tensor, refuse: Refuse | None) -> Tensor:
    """The bytes of a band that goes to a place of the file, in a buffer if it is long enough."""
    dtype = piece.recipe.dtype
    band = aligned(buffer, _nbytes(piece.recipe, at), place if place % dtype.itemsize == 0 else 0)
    try:
        piece.recipe.fill(band.view(dtype).view(sizes(at)), at)
    except CastOverflowError:
        if refuse is not None:
            refuse(piece)
        raise
    return band
