"""Weights that are read when an operator takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.weights.streamed import Room, StreamedWeight, change, replacement

VALUES = torch.arange(12.0).reshape(4, 3)
X = torch.tensor([[1.0, -2.0, 0.5]])


class Reader:
    """Gives a tensor and counts how often."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.reads = values, 0

    def __call__(self) -> Tensor:
        self.reads += 1
        return self.values.clone()


def weight(reader: Reader, room: Room, module: str = "layer") -> StreamedWeight:
    return StreamedWeight(reader.values.shape, reader.values.dtype, reader, room, module)


def test_shape_and_kind_are_known_without_reading() -> None:
    reader = Reader(VALUES)
    streamed = weight(reader, Room(0))
    layer = nn.Linear(3, 4)
    layer.weight = streamed
    assert layer.get_parameter("weight") is streamed
    assert isinstance(streamed, nn.Parameter)
    assert not streamed.requires_grad
    kind = (streamed.shape, streamed.dtype, streamed.device.type, streamed.numel(), streamed.dim())
    assert kind == ((4, 3), torch.float32, "cpu", 12, 2)
    assert str(streamed) == "StreamedWeight(layer, [4, 3])"
    assert reader.reads == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda w: nn.functional.linear(X, w),
        lambda w: X @ w.t(),
        lambda w: nn.functional.embedding(torch.tensor([2, 0]), w),
        lambda w: w[1:3] * 2,
        lambda w: w.detach(),
        lambda w: torch.cat([X, w]),
        lambda w: w.float().half(),
    ],
)
def test_any_operator_gets_the_values(use: Callable[[Tensor], Tensor]) -> None:
    result = use(weight(Reader(VALUES), Room(0)))
    assert type(result) is Tensor
    assert torch.equal(result, use(VALUES))


def test_weights_of_one_module_are_there_at_a_time() -> None:
    room = Room(0)
    one, other, next_one = (Reader(VALUES) for _ in range(3))
    first, second = weight(one, room, "a"), weight(other, room, "a")
    third = weight(next_one, room, "b")
    for _ in range(3):
        torch.equal(first, second)
    assert (one.reads, other.reads) == (1, 1)
    third.sum()
    first.sum()
    assert (one.reads, other.reads, next_one.reads) == (2, 1, 1)


def test_what_comes_first_stays_where_there_is_room() -> None:
    room = Room(2 * VALUES.nbytes + 1)
    readers = [Reader(VALUES) for _ in range(4)]
    weights = [weight(reader, room, str(i)) for i, reader in enumerate(readers)]
    for _ in range(3):
        for each in weights:
            each.sum()
    assert [reader.reads for reader in readers] == [1, 1, 3, 3]
    change(weights[0], torch.neg)  # its room is free again, and taken by who comes next
    weights[2].sum()
    weights[0].sum()
    weights[2].sum()
    assert [reader.reads for reader in readers] == [2, 1, 4, 3]


def test_of_a_table_only_rows_that_are_looked_up_are_read() -> None:
    asked = []

    def rows(numbers: Tensor) -> Tensor:
        asked.append(numbers.tolist())
        return VALUES[numbers]

    ids = torch.tensor([[3, 1, 3], [1, 1, 3]])
    reader, other = Reader(VALUES), Reader(VALUES)
    table = StreamedWeight(VALUES.shape, VALUES.dtype, reader, Room(0), "table", rows)
    fits = StreamedWeight(VALUES.shape, VALUES.dtype, other, Room(1000), "table", rows)
    for each in (table, fits, fits):
        result = nn.functional.embedding(ids, each, padding_idx=1)
        assert torch.equal(result, VALUES[ids])
    assert (asked, reader.reads, other.reads) == ([[1, 3]], 0, 1)
    change(table, torch.neg)
    assert torch.equal(nn.functional.embedding(ids, table), -VALUES[ids])
    assert (asked, reader.reads) == ([[1, 3]], 1)


@pytest.mark.parametrize("room", [0, 1000])
def test_changes_apply_whenever_it_is_read(room: int) -> None:
    in_memory = nn.Parameter(VALUES.clone(), requires_grad=False)
    streamed = weight(Reader(VALUES), Room(room))
    for each in (in_memory, streamed):
        change(each, lambda w: w + 1)
        change(each, lambda w: w * 2)
    for _ in range(2):
        assert torch.equal(streamed, (VALUES + 1) * 2)
        assert torch.equal(in_memory, streamed)


@pytest.mark.parametrize("room", [0, 1000])
def test_a_replacement_is_of_the_same_kind(room: int) -> None:
    other = VALUES + 5
    streamed = weight(Reader(VALUES), Room(room))
    streamed.sum()
    new = replacement(streamed, other, other.clone)
    assert isinstance(new, StreamedWeight)
    assert torch.equal(new, other)
    assert torch.equal(streamed, VALUES)
    in_memory = replacement(nn.Parameter(VALUES), other, other.clone)
    assert not isinstance(in_memory, StreamedWeight)
    assert torch.equal(in_memory, other)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.copy_(VALUES),
        lambda w: w.mul_(2),
        lambda w: torch.add(VALUES, VALUES, out=w),
    ],
)
def test_nothing_writes_into_it(write: Callable[[Tensor], object]) -> None:
    with pytest.raises(VerificationError, match="writes into a weight of layer"):
        write(weight(Reader(VALUES), Room(1000)))
