"""The head of a GGUF file: what it says is held against its bytes before anything is built."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bone_fx.base.sizes.config_sizes import refuse_impossible_gguf
from bone_fx.base.sizes.gguf_header import read_head
from bone_fx.errors import BaseModelError


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def head(values: dict[str, int], shape: tuple[int, ...] = (8, 4), **counts: Any) -> bytes:
    numbers = b"".join(text(k) + struct.pack("<IQ", 10, v) for k, v in values.items())
    words = text("tokens") + struct.pack("<IIQ", 9, 8, counts.get("words", 2)) + text("a") * 2
    tensor = text("w") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)
    size = struct.pack("<4sIQQ", b"GGUF", 3, counts.get("tensors", 1), len(values) + 1)
    return size + numbers + words + tensor + bytes(8 * 4 * 4)


def test_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(head({"llama.block_count": 2}))
    assert read_head(file).values == {"llama.block_count": 2}
    assert read_head(file).shapes == {"w": (8, 4)}
    refuse_impossible_gguf(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (head({}, words=2**60), "bytes before a value does"),
        (head({}, tensors=2**60), "does not keep to the format"),
        (head({}, shape=(2**40, 2**40)), r"\[1099511627776, 1099511627776\] is not in"),
        (head({}, shape=(2,) * 40), "'w' has 40 dimensions"),
        (head({"llama.block_count": 10**6}), "num_layers=1000000 is more than"),
        (head({"llama.embedding_length": 10**9}), "hidden_size=1000000000 is more than"),
        (head({"llama.context_length": 10**9}), "max_position_embeddings=1000000000 is more than"),
        (
            head({"llama.attention.head_count": 2**63}),
            "head_count=a number of 64 bits is more than",
        ),
        (head({})[:40], "does not keep to the format"),
        (b"GGUF", "does not keep to the format"),
    ],
)
def test_claims_beyond_the_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match=message):
        refuse_impossible_gguf(file)


def test_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    file, choose = tmp_path / "a.gguf", random.Random(0)
    for _ in range(300):
        content = bytearray(head({"llama.block_count": 2}))
        for _ in range(choose.randrange(1, 4)):
            content[choose.randrange(len(content))] = choose.randrange(256)
        file.write_bytes(content)
        with suppress(BaseModelError):
            refuse_impossible_gguf(file)
