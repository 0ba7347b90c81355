"""How a model's rotary function turns angles into a rotation, recognised on random data.

Shape letters: H heads, S tokens, D head size, R rotary width (R <= D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from bone_fx.capture.decoder.rotary.tables import Layout, RotaryTables, one_of_each


@dataclass(frozen=True)
class Convention:
    """How a rotary function turns a row of a table into a rotation.

    Attributes:
        layout: The R/2 angles stand in a row once (`whole`), twice one after the other (`halves`),
            or each twice (`pairs`).
        interleaved: Rotates columns (0, 1), (2, 3), … instead of (0, R/2), (1, R/2 + 1), ….
    """

    layout: Layout
    interleaved: bool


CONVENTIONS = tuple(
    Convention(layout, interleaved)
    for layout in ("halves", "pairs", "whole")
    for interleaved in (False, True)
)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotates the first R columns of `x` [..., S, D] by angles with cos and sin [S, R/2]."""
    width = 2 * cos.shape[-1]
    columns, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = columns[..., ::2], columns[..., 1::2]
        pair = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((pair.flatten(-2), rest), dim=-1)
    a, b = columns.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def recognise_rotation(
    function: FunctionType,
    others: Mapping[str, Any],
    sizes: Mapping[str, tuple[int, int]],
    tables: RotaryTables,
    axis: int,
) -> Convention | None:
    """The convention of a rotary function; None if it follows none of `CONVENTIONS`.

    Args:
        function: The function; it has parameters `cos` and `sin`.
        others: Its other arguments, apart from those it turns.
        sizes: Heads and head size of each argument that it turns.
        tables: The tables whose rows it is given.
        axis: Axis of the tokens in what it turns: 2 for [B, H, S, D], 1 for [B, S, H, D].
    """
    if any(isinstance(v, Tensor) for v in others.values()):
        return None
    positions = torch.tensor([0, 1, 2, min(7, tables.length - 1), tables.length - 1])
    cos, sin = tables.rows(positions, torch.float32)
    generator = torch.Generator().manual_seed(0)
    xs = {
        name: torch.randn(1, heads, len(positions), size, generator=generator)
        for name, (heads, size) in sizes.items()
    }
    given = {name: x if axis == 2 else x.transpose(1, 2) for name, x in xs.items()}
    try:
        outputs = function(**given, **others, cos=cos[None], sin=sin[None])
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    if not isinstance(outputs, tuple | list) or len(outputs) != len(xs):
        return None
    actual = [y if axis == 2 else y.transpose(1, 2) for y in outputs]
    for convention in CONVENTIONS:
        try:
            angles = [one_of_each(t, convention.layout) for t in (cos, sin)]
        except ValueError:
            continue
        if any(2 * angles[0].shape[-1] > x.shape[-1] for x in xs.values()):
            continue
        expected = [rotate(x, *angles, interleaved=convention.interleaved) for x in xs.values()]
        if all(
            y.shape == e.shape and torch.allclose(y, e, rtol=1e-5, atol=1e-5)
            for y, e in zip(actual, expected, strict=True)
        ):
            return convention
    return None
