"""Rows of a table: one of a kind in every run, all of them in the slow tier."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def tiered(rows: Iterable[Any], core: Collection[str]) -> list[Any]:
    """Parameters of a test, one a row with a `name`; rows outside `core` are slow.

    Args:
        rows: The table.
        core: Names of the rows of every run: one a kind of model.
    """
    rows = list(rows)
    assert set(core) <= {row.name for row in rows}, set(core) - {row.name for row in rows}
    return [
        pytest.param(row, id=row.name, marks=() if row.name in core else pytest.mark.slow)
        for row in rows
    ]


def slow(*rows: Any) -> list[Any]:
    """Parameters of a test for the slow tier only; a tuple is one row of several arguments."""
    return [
        pytest.param(*(row if isinstance(row, tuple) else (row,)), marks=pytest.mark.slow)
        for row in rows
    ]
