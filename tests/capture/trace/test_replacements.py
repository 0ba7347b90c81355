"""What is different while a model is traced is as before when the trace is over."""

from __future__ import annotations

import gc
import weakref

import pytest

from bone_fx.collector import old_objects_left_alone


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_only_new_garbage_is_collected() -> None:
    old = Node()
    old_reference = weakref.ref(old)
    with old_objects_left_alone():
        new = Node()
        new_reference = weakref.ref(new)
        del old, new
        gc.collect()
        assert new_reference() is None
        assert old_reference() is not None
    gc.collect()
    assert old_reference() is None


def test_the_collector_is_as_it_was_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), old_objects_left_alone():
        _ = 1 / 0
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen() -> None:
    gc.freeze()
    try:
        with old_objects_left_alone():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
