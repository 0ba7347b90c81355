"""Constants computed in bands by a few threads, and written and hashed in the order of the file.

Reading, computing, writing and hashing go on at the same time; no more than a few bands are in
memory. The bytes do not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from bone_fx.weights.boxes import Box, bands, whole
from bone_fx.weights.recipes import CastOverflowError, Recipe, Transpose

BAND_BYTES = 8 << 20
"""What is computed, written and hashed at a time, where a recipe can be cut."""

WORKERS = 2
_AHEAD = WORKERS + 1
_SHORTEST_RUN = 2048


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


Refuse = Callable[[Piece], None]


def write_stream(
    file: BinaryIO,
    pieces: Iterable[Piece],
    *,
    refuse: Refuse | None = None,
    advance: Callable[[int], None] | None = None,
    head: bytes = b"",
) -> str:
    """Write constants one after another.

    Args:
        file: Unbuffered, at the start.
        pieces: In the order of their offsets, which count from the end of `head`.
        refuse: Told of a constant that a cast makes infinite; raises what a person should read.
        advance: Told the number of bytes of each write.
        head: What comes first.

    Returns:
        SHA-256 of everything written.
    """
    digest = hashlib.sha256()
    with _workers() as pool, ThreadPoolExecutor(1) as hashing:
        hashed: Future[None] | None = None

        def put(content: bytes | memoryview) -> None:
            nonlocal hashed
            before, hashed = hashed, hashing.submit(digest.update, content)
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            if before is not None:
                before.result()
            if advance is not None:
                advance(len(content))

        waiting: deque[tuple[int, Future[Tensor]]] = deque()
        end = 0

        def write_first() -> None:
            nonlocal end
            offset, computed = waiting.popleft()
            content = _bytes(computed.result())
            if offset > end:
                put(bytes(offset - end))
            if content:
                put(content)
            end = offset + len(content)

        try:
            if head:
                put(head)
            for offset, piece, at in _cut(pieces):
                waiting.append((offset, pool.submit(_compute, piece, at, refuse)))
                if len(waiting) > _AHEAD:
                    write_first()
            while waiting:
                write_first()
        finally:
            for _, computed in waiting:
                computed.cancel()
        if hashed is not None:
            hashed.result()
    return digest.hexdigest()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads that compute on one core each: PyTorch's own threads would stand in each other's way.

    PyTorch keeps the number for each thread, and one for threads to come, which is put back.
    """
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _cut(pieces: Iterable[Piece]) -> Iterator[tuple[int, Piece, Box]]:
    """Every band with the offset of its first byte."""
    for piece in pieces:
        recipe = piece.recipe
        box = whole(recipe.shape)
        itemsize = recipe.dtype.itemsize
        if not box or not recipe.cuts(0) or 0 in recipe.shape:
            yield piece.offset, piece, box
            continue
        row = math.prod(recipe.shape[1:]) * itemsize
        # A transposed constant is read in runs as long as a band has rows.
        rows = max(BAND_BYTES // row, _SHORTEST_RUN // itemsize if _is_transposed(recipe) else 1)
        for band in bands(box, rows * row, itemsize):
            yield piece.offset + band[0][0] * row, piece, band


def _is_transposed(recipe: Recipe) -> bool:
    return isinstance(recipe, Transpose) or any(map(_is_transposed, recipe.inputs()))


def _compute(piece: Piece, at: Box, refuse: Refuse | None) -> Tensor:
    try:
        return piece.recipe.part(at)
    except CastOverflowError:
        if refuse is not None:
            refuse(piece)
        raise


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
