"""Memory that is used again: never by two at once, and copies through it hold every bit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from bone_fx.weights.storage import scratch as module
from bone_fx.weights.storage.scratch import contiguous, put, scratch


def test_open_uses_never_share_memory() -> None:
    with scratch((3, 5), torch.float32) as outer:
        outer.fill_(1)
        with scratch((7,), torch.int64) as inner:
            inner.fill_(-1)
        with scratch((2, 2), torch.float16) as inner:
            inner.fill_(2)
        assert (outer == 1).all()


def test_what_is_closed_is_used_again() -> None:
    with scratch((1024,), torch.float32) as first:
        place = first.data_ptr()
    with pytest.raises(ZeroDivisionError), scratch((8, 8), torch.bfloat16):
        raise ZeroDivisionError
    with scratch((16, 32), torch.bfloat16) as second:
        assert second.data_ptr() == place
        assert second.shape == (16, 32)


def test_threads_have_their_own() -> None:
    both = Barrier(2)

    def place() -> int:
        with scratch((64,), torch.float32) as tensor:
            both.wait(timeout=60)
            return tensor.data_ptr()

    with ThreadPoolExecutor(2) as pool:
        one, other = [pool.submit(place) for _ in range(2)]
        assert one.result() != other.result()


def test_what_is_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1 << 20)
    with scratch((1 << 19,), torch.float32) as tensor:
        tensor.fill_(1)
    with scratch((0,), torch.float32) as empty:
        assert empty.untyped_storage().nbytes() <= 1 << 20


@pytest.mark.parametrize("shape", [(80, 50), (1, 50), (80, 1), (3, 0), (200, 300)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_put_copies_to_any_strides(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-1000, 1000, shape, generator=generator).to(dtype)
    rows, columns = shape
    for out in (
        torch.zeros(shape, dtype=dtype),
        torch.zeros(columns, rows, dtype=dtype).t(),
        torch.zeros(columns, rows + 7, dtype=dtype)[:, 3 : 3 + rows].t(),
        torch.zeros(rows, columns * 2, dtype=dtype)[:, ::2],
    ):
        put(values, out)
        assert torch.equal(out, values)
        with contiguous(out) as again:
            assert again.is_contiguous()
            again.copy_(-values)
        assert torch.equal(out, -values)
