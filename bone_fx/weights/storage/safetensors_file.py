"""Reading safetensors files by position: a checked header, and tensors or parts of them.

The file is not mapped: mapped pages count as the process's memory, and a fold of a large checkpoint
would seem to hold all of it. Layout: 8 bytes little-endian header size, that many bytes of JSON,
then the data.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from bone_fx.errors import BaseModelError
from bone_fx.weights.storage.boxes import Box, whole
from bone_fx.weights.storage.scratch import scratch

TILE_BYTES = 64 * 2**20
_GAP_BYTES = 32 << 10
"""So many bytes are read sooner than a second call is made."""

_STRETCH_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100_000_000
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a file.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        offset: First byte, counted from the start of the file.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors of a file, in the order of their bytes.

    Raises:
        BaseModelError: The file cannot be read, is cut off, or its header is not what the format
            allows.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _MAX_HEADER_BYTES):
                raise _broken(path, f"the header claims {header_bytes} bytes of a file of {size}")
            text = file.read(header_bytes)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _broken(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ is not texts by name")
    start = 8 + header_bytes
    entries = {key: _entry(path, key, raw, start, size) for key, raw in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: item[1].offset))
    _check_cover(path, entries, start, size)
    return entries


def read_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """Read one tensor.

    Raises:
        BaseModelError: The file cannot be read or is shorter than its header says.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    read_part(path, entry, whole(entry.shape), tensor)
    return tensor


def read_part(path: Path, entry: TensorEntry, at: Box, into: Tensor) -> None:
    """Read a part of a tensor.

    Args:
        path: The file.
        entry: The tensor.
        at: The part.
        into: Contiguous, of the part's shape and the tensor's dtype.

    Raises:
        BaseModelError: The file cannot be read or is shorter than its header says.
    """
    if into.numel() == 0:
        return
    # Not an object of Python's: one opens for every part, and a part is read in 100 µs.
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    try:
        _read_runs(descriptor, path, entry, at, into)
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from error
    finally:
        os.close(descriptor)


def _read_runs(descriptor: int, path: Path, entry: TensorEntry, at: Box, into: Tensor) -> None:
    """Read a part's runs: one by one, or with what lies between them if that is quicker."""
    runs = _runs(entry, at)
    content = into.reshape(-1).view(torch.uint8)
    place = 0
    for offset in runs.offsets:
        if runs.count == 1:
            _read(descriptor, _buffer(content[place : place + runs.length]), offset, path)
            place += runs.length
            continue
        step = max(1, _STRETCH_BYTES // runs.pitch)
        for first in range(0, runs.count, step):
            number = min(step, runs.count - first)
            target = content[place : place + number * runs.length].view(number, runs.length)
            # The last run ends before its row does, and the file may end with it.
            stretch = (number - 1) * runs.pitch + runs.length
            with scratch((number * runs.pitch,), torch.uint8) as rows:
                _read(descriptor, _buffer(rows[:stretch]), offset + first * runs.pitch, path)
                target.copy_(rows.view(number, runs.pitch)[:, : runs.length])
            place += target.numel()


def _buffer(tensor: Tensor) -> memoryview:
    # An array is a buffer, which its annotation does not say before Python 3.12.
    return memoryview(tensor.numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Runs:
    """The stretches of a file that a part is made of, in groups of equal pitch.

    Attributes:
        offsets: Where each group begins.
        count: Runs in a group.
        pitch: Bytes from the start of a run to the next one's.
        length: Bytes of a run.
    """

    offsets: Iterator[int]
    count: int
    pitch: int
    length: int


def _runs(entry: TensorEntry, at: Box) -> _Runs:
    """Where the bytes of a part lie."""
    itemsize = entry.dtype.itemsize
    inner = len(at)  # dimensions from here on are read whole
    while inner and at[inner - 1] == (0, entry.shape[inner - 1]):
        inner -= 1
    if inner == 0:
        return _Runs(iter((entry.offset,)), 1, entry.nbytes, entry.nbytes)
    strides = [math.prod(entry.shape[axis + 1 :]) * itemsize for axis in range(inner)]
    start, stop = at[inner - 1]
    length = (stop - start) * strides[-1]
    outer, count, pitch = inner - 1, 1, length
    if outer and strides[outer - 1] - length <= _GAP_BYTES:
        outer -= 1
        pitch, count = strides[outer], at[outer][1] - at[outer][0]
    first = entry.offset + sum(at[axis][0] * strides[axis] for axis in range(outer, inner))
    offsets = (
        first + sum(i * stride for i, stride in zip(index, strides, strict=False))
        for index in itertools.product(*(range(*span) for span in at[:outer]))
    )
    return _Runs(offsets, count, pitch, length)


def _read(descriptor: int, view: memoryview, offset: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + TILE_BYTES]], offset + done)
        if count == 0:
            raise _broken(path, f"it ends {len(view) - done} bytes before a tensor does")
        done += count


def same_bytes(path: Path, entry: TensorEntry, other_path: Path, other: TensorEntry) -> bool:
    """Whether two tensors are the same bit for bit, compared tile by tile."""
    if (entry.shape, entry.dtype) != (other.shape, other.dtype):
        return False
    with path.open("rb", buffering=0) as file, other_path.open("rb", buffering=0) as other_file:
        for done in range(0, entry.nbytes, TILE_BYTES):
            count = min(TILE_BYTES, entry.nbytes - done)
            tile = os.pread(file.fileno(), count, entry.offset + done)
            if tile != os.pread(other_file.fileno(), count, other.offset + done):
                return False
    return True


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(path: Path, key: str, raw: object, start: int, size: int) -> TensorEntry:
    if not isinstance(raw, Mapping):
        raise _broken(path, f"the entry of {key!r} is not an object")
    dtype = DTYPES.get(str(raw.get("dtype")))
    if dtype is None:
        raise _broken(
            path, f"{key!r} has dtype {raw.get('dtype')!r}", expected=f"one of {', '.join(DTYPES)}"
        )
    shape, offsets = raw.get("shape"), raw.get("data_offsets")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _broken(path, f"{key!r} has shape {shape!r} and data_offsets {offsets!r}")
    begin, end = offsets
    entry = TensorEntry(tuple(shape), dtype, start + begin)
    if end - begin != entry.nbytes:
        raise _broken(
            path,
            f"{key!r} has {end - begin} bytes",
            expected=f"{entry.nbytes} for {dtype} {list(shape)}",
        )
    if start + end > size:
        raise _broken(
            path, f"it has {size} bytes and {key!r} ends at byte {start + end}: the file is cut off"
        )
    return entry


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_cover(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """Every byte behind the header is one tensor's, as the format asks and its library checks."""
    end = start
    for key, entry in entries.items():
        if entry.offset < end:
            raise _broken(path, f"the bytes of {key!r} overlap another tensor's")
        if entry.offset > end:
            raise _broken(path, f"{entry.offset - end} bytes before {key!r} are no tensor's")
        end = entry.offset + entry.nbytes
    if end < size:
        raise _broken(path, f"{size - end} bytes at the end are no tensor's")


def _broken(path: Path, problem: str, expected: str | None = None) -> BaseModelError:
    return BaseModelError(
        f"{path} is not a readable safetensors file",
        expected=expected,
        found=problem,
        next_step="copy or download it again",
    )
