"""The tables of a rotary embedding, from the model's own module.

Shape letters: R rotary width, M positions in a table, W width of a table (R or R/2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bone_fx.capture.trace.outside_trace import untraced
from bone_fx.errors import CaptureError

Layout = Literal["whole", "halves", "pairs"]
"""The R/2 angles stand in a row once, twice one after the other, or each twice."""

Rows = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""Gives cos and sin, each [n, W], for n positions in a dtype."""

TILE = 4096
ENDLESS = 1 << 24


@dataclass
class RotaryTables:
    """The whole tables of one rotary embedding, made when first asked for.

    Args:
        rows: Gives cos and sin, each [n, W], for n positions in a dtype.
        length: M.
        dtype: The dtype of the graph.
        switch: Longest text, in tokens, with angles of its own (longrope's short factors); None if
            angles depend on the position alone.
        fixed: Whether the angles of still longer texts are others, so that the module looks at the
            length and its code cannot be traced.
    """

    rows: Rows
    length: int
    dtype: torch.dtype
    switch: int | None = None
    fixed: bool = False
    _halves: dict[Layout | None, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def angles(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Tables [M, R/2] of cos and sin; those of short texts, [switch, R/2], stand before.

        In the dtype of the graph, as the operators take them: some modules (OLMo-2's) turn heads in
        float32 and hand out such tables.
        """
        return self._whole(layout)

    def as_made(self) -> tuple[Tensor, Tensor]:
        """The same tables as wide as the module makes them, [M, W]."""
        return self._whole(None)

    def _whole(self, layout: Layout | None) -> tuple[Tensor, Tensor]:
        if layout not in self._halves:
            self._halves[layout] = untraced(lambda: self._evaluate(layout))
        return self._halves[layout]

    def rows_of_long(self, positions_M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows of a text of M tokens."""
        if self.switch is None:
            return self.rows(positions_M, dtype)
        last = torch.tensor([self.length - 1])
        cos, sin = self.rows(torch.cat((positions_M, last)), dtype)
        return cos[:-1], sin[:-1]

    def _evaluate(self, layout: Layout | None) -> tuple[Tensor, Tensor]:
        parts = [(self.rows, self.switch or 0), (self.rows_of_long, self.length)]
        tiles = []
        for rows, length in parts:
            for start in range(0, length, TILE):
                positions = torch.arange(start, min(start + TILE, length))
                pair = rows(positions, self.dtype)
                tiles.append(
                    [one_of_each(t, layout).to(self.dtype) for t in pair] if layout else list(pair)
                )
        return torch.cat([t[0] for t in tiles]), torch.cat([t[1] for t in tiles])


def rows_of(twin: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    """Runs a copy of a rotary module on other positions than it was called with.

    Args:
        twin: A copy with real buffers; it is copied again for each run, as some modules change
            themselves.
        args: The positional arguments of a call: one tensor of integers is the positions.
        kwargs: The keyword arguments of that call.
    """

    def rows(positions_M: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        def stand_in(value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            return (
                torch.zeros(1, 1, 1, dtype=dtype)
                if value.is_floating_point()
                else positions_M[None]
            )

        positional = [stand_in(value) for value in args]
        cos, sin = copy.deepcopy(twin)(*positional, **{k: stand_in(v) for k, v in kwargs.items()})
        return cos[0], sin[0]

    return rows


def one_of_each(table_MW: Tensor, layout: Layout) -> Tensor:
    """The R/2 distinct columns of a table, contiguous.

    Raises:
        ValueError: The table does not have this layout.
    """
    width = table_MW.shape[-1]
    if layout == "whole":
        return table_MW.contiguous()
    if width % 2:
        raise ValueError(f"a table of odd width {width} has no {layout}")
    first, second = {
        "halves": (table_MW[..., : width // 2], table_MW[..., width // 2 :]),
        "pairs": (table_MW[..., ::2], table_MW[..., 1::2]),
    }[layout]
    if not torch.equal(first, second):
        raise ValueError(f"a table that is not laid out in {layout}")
    return first.contiguous()


def tables_of(rows: Rows, length: int, dtype: torch.dtype, module: nn.Module) -> RotaryTables:
    """The tables of a module, with what they are for texts of other lengths.

    Longrope has short factors up to a length and long ones beyond it. Dynamic NTK has none up to a
    length and others for every length beyond it, which no table can hold.

    Args:
        rows: The rows of a text that ends with the last of the positions.
        length: M.
        dtype: The dtype of the graph.
        module: The module that makes them, for the error.

    Raises:
        CaptureError: Among the texts of at most `length` tokens each length has angles of its own.
    """
    first = rows(torch.tensor([1]), torch.float32)
    fixed = not _alike(rows, ENDLESS, first)
    if not fixed or length < 3 or _alike(rows, length, first):
        return RotaryTables(rows, length, dtype, None, fixed)
    low, high = 2, length
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _alike(rows, middle, first) else (low, middle)
    last = rows(torch.tensor([1, length - 1]), torch.float32)
    if _alike(rows, high, last) and _alike(rows, (high + length) // 2, last):
        return RotaryTables(rows, length, dtype, low, fixed)
    raise CaptureError(
        f"the rotary embedding {type(module).__name__} (type "
        f"{getattr(module, 'rope_type', 'unknown')}) has other angles for every length of the text",
        expected=f"at most {low} positions, up to which they depend on the position alone",
        found=f"{length} positions",
        next_step=f"export it for {low} positions: max_position_embeddings of the configuration",
    )


def _alike(rows: Rows, tokens: int, other: tuple[Tensor, Tensor]) -> bool:
    """Whether position 1 has the angles of `other` in a text of so many tokens."""
    actual = rows(torch.tensor([1, tokens - 1]), torch.float32)
    return all(torch.equal(a[:1], b[:1]) for a, b in zip(actual, other, strict=True))
