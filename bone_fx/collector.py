"""The garbage collector while graphs are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Keeps the garbage collector to objects that are made while this is open.

    A trace makes so many that every generation is collected several times, and each full collection
    would visit the million objects of PyTorch and transformers: a quarter of the time of a trace.
    """
    if gc.get_freeze_count():  # somebody froze objects, perhaps this function; they stay frozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
