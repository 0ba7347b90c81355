"""A figure a layer and site, laid out for a drawing: rows are layers, columns are sites."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_COLUMNS = 24
_MOST_ROWS = 400
_LABEL = 22
"""A label of a column is cut after so many characters."""
_CELL, _ROW, _CHARACTER = 46, 20, 7
"""Width of a cell, height of a row and width of a character, in pixels of the drawing."""


@dataclass(frozen=True)
class Cell:
    """A figure.

    Attributes:
        site: Name of the layer, or of several with numbers as `*`.
        value: The figure, of several the largest.
        strength: The figure over the largest of the map, 0 to 1.
        x: Left edge.
        y: Upper edge.
    """

    site: str
    value: float
    strength: float
    x: int
    y: int


@dataclass(frozen=True)
class HeatMap:
    """A drawing.

    Attributes:
        columns: Label and left edge of every column.
        rows: Label and upper edge of every row.
        cells: The figures.
        largest: The largest figure.
        width: Width of all of it.
        height: Height of all of it.
        head: Height of the labels of the columns.
        left_out: Number of figures for which there is no room.
    """

    columns: Sequence[tuple[str, int]]
    rows: Sequence[tuple[str, int]]
    cells: Sequence[Cell]
    largest: float
    width: int
    height: int
    head: int
    left_out: int
    cell: int = _CELL
    row: int = _ROW


def heat_map(values: Mapping[str, float | None]) -> HeatMap | None:
    """Lay out figures by the names of their layers; None if there are none.

    The first number in a name counts the layer: `model.layers.3.mlp.up_proj` is row 3, column
    `mlp.up_proj`. Many experts of a layer share a column.
    """
    places = {name: _place(name) for name, value in values.items() if value is not None}
    if len({column for _, _, column in places.values()}) > _MOST_COLUMNS:
        places = {name: (p, i, re.sub(r"\d+", "*", c)) for name, (p, i, c) in places.items()}
    if not places:
        return None
    in_order = dict.fromkeys(stack for stack, _, _ in places.values())
    stacks = {stack: number for number, stack in enumerate(in_order)}
    rows = sorted(
        {(stack, index) for stack, index, _ in places.values()},
        key=lambda row: (stacks[row[0]], row[1]),
    )
    columns = list(dict.fromkeys(column for _, _, column in places.values()))
    row_of = {row: number for number, row in enumerate(rows)}
    column_of = {column: number for number, column in enumerate(columns)}
    shown: dict[tuple[int, int], tuple[str, float]] = {}
    left_out = 0
    for name, (stack, index, column) in places.items():
        at = row_of[stack, index], column_of[column]
        value = values[name] or 0.0
        if at[0] >= _MOST_ROWS or at[1] >= _MOST_COLUMNS:
            left_out += 1
        elif at not in shown or value > shown[at][1]:
            shown[at] = (name, value)
    rows, columns = rows[:_MOST_ROWS], columns[:_MOST_COLUMNS]
    labels = [_row_label(stack, index, several=len(stacks) > 1) for stack, index in rows]
    names = _column_labels(columns)
    left = _CHARACTER * max(map(len, labels)) + 8
    head = _CHARACTER * max(map(len, names)) + 8
    largest = max(value for _, value in shown.values())
    return HeatMap(
        columns=[(label, left + _CELL * i) for i, label in enumerate(names)],
        rows=[(label, head + _ROW * i) for i, label in enumerate(labels)],
        cells=[
            Cell(
                name, value, value / largest if largest else 0.0, left + _CELL * c, head + _ROW * r
            )
            for (r, c), (name, value) in sorted(shown.items())
        ],
        largest=largest,
        width=left + _CELL * len(columns),
        height=head + _ROW * len(rows),
        head=head,
        left_out=left_out,
    )


def _place(name: str) -> tuple[str, int, str]:
    """The stack of layers that a layer is in, its number there (-1 for none), and its site."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if at is None:
        return "", -1, name
    return ".".join(parts[:at]), int(parts[at][:9]), ".".join(parts[at + 1 :]) or parts[at - 1]


def _row_label(stack: str, index: int, *, several: bool) -> str:
    number = "" if index < 0 else str(index)
    return _cut(f"{stack}.{number}".strip(".")) if several and stack else number


def _column_labels(columns: Sequence[str]) -> list[str]:
    """The last parts of the sites' names, with as many before them as tell them apart."""
    for count in range(1, 5):
        labels = [".".join(column.split(".")[-count:]) for column in columns]
        if len(set(labels)) == len(columns):
            return [_cut(label) for label in labels]
    return [_cut(column) for column in columns]


def _cut(label: str) -> str:
    return label if len(label) <= _LABEL else "…" + label[1 - _LABEL :]
