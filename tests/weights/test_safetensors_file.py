"""The safetensors reader against the safetensors package, and against files that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bone_fx.errors import BaseModelError
from bone_fx.weights.storage import safetensors_file
from bone_fx.weights.storage.safetensors_file import (
    file_sha256,
    read_header,
    read_part,
    read_tensor,
    same_bytes,
)


def _write(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int8,
        torch.bool,
    ],
)
def test_reads_what_safetensors_wrote(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "TILE_BYTES", 24)  # many tiles, the last one ragged
    shapes: dict[str, tuple[int, ...]] = {
        "a": (5, 7),
        "scalar": (),
        "empty": (0, 3),
        "c": (2, 3, 4),
    }
    tensors = {name: torch.randn(shape).mul(9).to(dtype) for name, shape in shapes.items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    entries = read_header(file)
    assert set(entries) == set(tensors)
    assert [e.offset for e in entries.values()] == sorted(e.offset for e in entries.values())
    for name, tensor in tensors.items():
        value = read_tensor(file, entries[name])
        assert value.dtype == dtype
        assert torch.equal(value, tensor)


def test_compares_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "TILE_BYTES", 16)
    file = tmp_path / "f.safetensors"
    tensor = torch.arange(30.0)
    changed = tensor.clone()
    changed[-1] += 1
    save_file(
        {"a": tensor, "b": tensor.clone(), "c": changed, "d": tensor.view(5, 6).clone()}, file
    )
    entries = read_header(file)
    assert same_bytes(file, entries["a"], file, entries["b"])
    assert not same_bytes(file, entries["a"], file, entries["c"])
    assert not same_bytes(file, entries["a"], file, entries["d"])


def test_hash(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"abc")
    assert file_sha256(file) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "size", "message"),
    [
        ({"a": _F32}, b"\0" * 7, None, "cut off"),
        ({"a": {**_F32, "shape": [3]}}, b"\0" * 8, None, "expected: 12"),
        ({"a": {**_F32, "shape": [-2]}}, b"\0" * 8, None, r"\[-2\]"),
        ({"a": {**_F32, "shape": [True, 2]}}, b"\0" * 8, None, "True"),
        ({"a": {**_F32, "data_offsets": [8, 0]}}, b"\0" * 8, None, "-8 bytes"),
        ({"a": {**_F32, "data_offsets": [0]}}, b"\0" * 8, None, "data_offsets"),
        ({"a": {**_F32, "dtype": "F33"}}, b"\0" * 8, None, "F33"),
        ({"a": {**_F32, "shape": [2**62], "data_offsets": [0, 2**64]}}, b"", None, "cut off"),
        ({"a": _F32, "b": {**_F32, "data_offsets": [4, 12]}}, b"\0" * 12, None, "overlap"),
        ({"a": _F32}, b"\0" * 12, None, "4 bytes at the end are no tensor's"),
        ({"a": {**_F32, "data_offsets": [4, 12]}}, b"\0" * 12, None, "4 bytes before 'a'"),
        ({"__metadata__": {"format": 3}}, b"", None, "__metadata__"),
        ({"a": 1}, b"", None, "not an object"),
        ([], b"", None, "not a JSON object"),
        (b"{", b"", None, "not JSON"),
        (b"[" * 100_000, b"", None, "not JSON"),
        (b"\xff\xfe", b"", None, "not JSON"),
        ({}, b"", 2**63, "claims"),
        ({}, b"", 200, "claims"),
    ],
)
def test_refuses_a_broken_file(
    header: Any, data: bytes, size: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=message):
        read_header(_write(tmp_path / "model.safetensors", header, data, size))


@pytest.mark.parametrize("content", [b"", b"1234"])
def test_refuses_a_file_without_header(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match="claims"):
        read_header(file)


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    entry = read_header(file)["a"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="1 bytes before"):
        read_tensor(file, entry)


@pytest.mark.parametrize("shape", [(3, 4, 50), (70, 20_000), (2, 9, 3, 5)])
@pytest.mark.parametrize("gap", [0, 64, 1 << 15])
@pytest.mark.parametrize("stretch", [1, 500, 1 << 20])
def test_any_part_is_read(
    shape: tuple[int, ...], gap: int, stretch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_GAP_BYTES", gap)
    monkeypatch.setattr(safetensors_file, "_STRETCH_BYTES", stretch)
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(-(1 << 15), 1 << 15, shape, generator=generator).to(torch.int16)
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    entry = read_header(tmp_path / "x.safetensors")["x"]
    for _ in range(30):
        box = []
        for size in shape:
            start, stop = torch.randint(0, size + 1, (2,), generator=generator).sort()[0].tolist()
            whole = bool(torch.rand((), generator=generator) < 0.3)
            box.append((0, size) if whole else (start, stop))
        slices = tuple(slice(*span) for span in box)
        expected = tensor[slices].contiguous()
        found = torch.full_like(expected, 7)
        read_part(tmp_path / "x.safetensors", entry, tuple(box), found)
        assert torch.equal(found, expected)
