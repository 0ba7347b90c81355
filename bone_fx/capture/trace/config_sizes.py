"""Sizes that a configuration states: missing, None or 0 alike, and never text in place of one."""

from __future__ import annotations

from typing import Any

from bone_fx.errors import CaptureError


def size_in(config: Any, *names: str) -> int | None:
    """The first of some fields that states a size; None if none does.

    Args:
        config: A configuration of a model, or of a part of it.
        names: Its fields. One that is missing, None, or not above 0 (-1 is "no limit") is passed
            over.

    Raises:
        CaptureError: A field holds something else than a whole number.
    """
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if not whole or isinstance(value, bool):
            raise CaptureError(
                f"{name} of {type(config).__name__} is no size",
                expected="a whole number, or none at all",
                found=repr(value),
                next_step="correct it in the configuration",
            )
        if value > 0:
            return int(value)
    return None
