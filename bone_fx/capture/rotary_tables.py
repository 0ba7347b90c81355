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

from bone_fx.capture.untraced import untraced
from bone_fx.errors import CaptureError

Layout = Literal["whole", "halves", "pairs"]
"""The R/2 angles stand in a row once, twice one after the other, or each twice."""

Rows = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]
"""Gives cos and sin, each [n, W], for n positions in a dtype."""

TILE = 4096


@dataclass
class RotaryTables:
    """The whole tables of one rotary embedding, made when first asked for.

    Args:
        rows: Gives cos and sin, each [n, W], for n positions in a dtype.
        length: M.
        dtype: The dtype of the graph.
    """

    rows: Rows
    length: int
    dtype: torch.dtype
    _halves: dict[Layout, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def angles(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Tables [M, R/2] of cos and sin."""
        if layout not in self._halves:
            self._halves[layout] = untraced(lambda: self._evaluate(layout))
        return self._halves[layout]

    def _evaluate(self, layout: Layout) -> tuple[Tensor, Tensor]:
        tiles = []
        for start in range(0, self.length, TILE):
            positions = torch.arange(start, min(start + TILE, self.length))
            tiles.append([one_of_each(t, layout) for t in self.rows(positions, self.dtype)])
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


def refuse_length_dependence(rows: Rows, length: int, module: nn.Module) -> None:
    """Raises CaptureError if angles depend on the length of the text (dynamic NTK, longrope)."""
    few = torch.tensor([0, 1, 2, 3, 5])
    alone = rows(few, torch.float32)
    for last in (length - 1, 2 * length):
        together = rows(torch.cat((few, torch.tensor([last]))), torch.float32)
        if not all(torch.equal(a, b[:-1]) for a, b in zip(alone, together, strict=True)):
            kind = getattr(module, "rope_type", "unknown")
            raise CaptureError(
                f"the rotary embedding {type(module).__name__} (type {kind}) "
                "depends on the length of the text",
                expected="angles that depend on the position alone (default, linear, yarn, llama3)",
                found="dynamic NTK or longrope scaling",
                next_step="set another rope type in the base's config.json if the model allows it",
            )
