"""Buffers that are used again: the same memory for a slot, and none where it would be seen."""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bone_fx.operators.workspace import LARGEST, workspace

LIKE = torch.zeros(1)


def place(slot: str, shape: tuple[int, ...], like: Tensor = LIKE) -> int:
    buffer = workspace(slot, shape, like)
    assert buffer is not None
    assert buffer.shape == shape
    assert buffer.dtype == like.dtype
    return buffer.data_ptr()


def test_a_slot_has_one_buffer() -> None:
    first = place("test", (4, 6))
    assert place("test", (3, 8)) == first
    assert place("test", (2, 2)) == first
    others = [place("other", (4, 6)), place("test", (4, 6), LIKE.double())]
    thread = threading.Thread(target=lambda: others.append(place("test", (4, 6))))
    thread.start()
    thread.join()
    assert len({first, *others}) == 4


def test_none_where_it_is_of_no_use() -> None:
    most = LARGEST // LIKE.element_size()
    assert workspace("test", (most + 1,), LIKE) is None
    with torch.inference_mode():
        assert workspace("test", (1,), LIKE) is None
    with FakeTensorMode() as mode:
        assert workspace("test", (1,), mode.from_tensor(LIKE)) is None
        assert workspace("test", (1,), LIKE) is None
