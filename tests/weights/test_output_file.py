"""A file has what was written, whether the pages went past the cache or not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from bone_fx.weights.writing import output_file as module
from bone_fx.weights.writing.output_file import ALIGNMENT, aligned, buffer_of, output_file

LENGTHS = (10, 3 * ALIGNMENT, 1, 5 * ALIGNMENT + 77, 64, 2 * ALIGNMENT - 152, ALIGNMENT)


def _write(path: Path, *, in_place: bool) -> bytes:
    """Write tensors of awkward lengths from one buffer; returns what the file should hold."""
    generator = torch.Generator().manual_seed(0)
    buffer, expected = buffer_of(0), b""
    with output_file(path, 1 << 20) as file:
        for length in LENGTHS:
            buffer = aligned(buffer, length, file.end if in_place else 1)
            buffer.random_(0, 256, generator=generator)
            file.write(buffer)
            expected += buffer.numpy().tobytes()
            assert file.end == len(expected)
    return expected


@pytest.fixture
def descriptors(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Every descriptor that is written to; files count as large."""
    seen: set[int] = set()
    pwrite = os.pwrite

    def noting(descriptor: int, view: memoryview, offset: int) -> int:
        seen.add(descriptor)
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(module, "_memory", lambda: 0)
    monkeypatch.setattr(os, "pwrite", noting)
    return seen


@pytest.mark.parametrize("in_place", [True, False])
def test_direct_writes(tmp_path: Path, descriptors: set[int], in_place: bool) -> None:
    (tmp_path / "data").write_bytes(b"x" * (1 << 20))
    expected = _write(tmp_path / "data", in_place=in_place)
    assert (tmp_path / "data").read_bytes() == expected
    assert len(descriptors) == (2 if in_place and module._DIRECT else 1)


def test_a_small_file_stays_in_the_cache(
    tmp_path: Path, descriptors: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_memory", lambda: 8 << 20)
    assert _write(tmp_path / "data", in_place=True) == (tmp_path / "data").read_bytes()
    assert len(descriptors) == 1


@pytest.mark.skipif(not module._DIRECT, reason="no direct writes that could be refused")
@pytest.mark.parametrize("at_open", [True, False])
def test_a_file_system_without_direct_writes(
    tmp_path: Path, at_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_memory", lambda: 0)
    direct: set[int] = set()
    really_open, pwrite = os.open, os.pwrite

    def opening(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & module._DIRECT and at_open:
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = really_open(path, flags, mode)
        if flags & module._DIRECT:
            direct.add(descriptor)
        return descriptor

    def writing(descriptor: int, view: memoryview, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    assert _write(tmp_path / "data", in_place=True) == (tmp_path / "data").read_bytes()
    assert bool(direct) != at_open


def test_a_full_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, view: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_memory", lambda: 0)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "data", in_place=True)
