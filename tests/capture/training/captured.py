"""Training captures that several tests of a row share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from bone_fx.capture.training.capture_training import TrainingCapture, capture_training
from bone_fx.passes.dropout import set_dropout
from tests.capture.architectures import BY_NAME


class Captured(NamedTuple):
    """A row's model and its capture, both as they are right after the capture."""

    model: Any
    capture: TrainingCapture


def captured(name: str) -> Captured:
    """The row of this name: for tests that change nothing but modes."""
    row = _captured(name)
    row.model.eval()
    set_dropout(row.capture.graph_module, training=True)
    return row


# Tests of a row follow one another (`scope="session"` where they are parametrized).
@lru_cache(maxsize=2)
def _captured(name: str) -> Captured:
    row = BY_NAME[name]
    model = row.build()
    return Captured(model, capture_training(model, row.inputs(3, 12)))
