"""The loss of a head, compared with what the model's own forward computes from labels.

Which loss a head has is inferred from names (`capture.training.loss`). A subclass whose forward
smooths labels or weighs classes looks the same. So the model runs once on the example inputs with
labels made up, some of them to be ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from bone_fx.capture.trace.examples import Examples
from bone_fx.capture.trace.hf_model import without_cache
from bone_fx.capture.training.loss import ModelLoss, possible_losses
from bone_fx.errors import first_line

_RELATIVE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Tolerance by dtype of the loss: both come from the same logits. 1e-2 in the half ones."""


def checked_loss(
    model: torch.nn.Module, examples: Examples, output: Any
) -> tuple[ModelLoss | None, tuple[str, ...]]:
    """The loss that a model computes from labels, if it is one that is known.

    Args:
        model: The model; it is put into evaluation mode.
        examples: The example inputs.
        output: What the model gives back for them without labels.

    Returns:
        The loss, or None; and notes on why there is none where one was expected.
    """
    losses = possible_losses(model)
    likeliest = next(losses, None)
    if likeliest is None or not isinstance(output, Mapping):
        return None, ()
    model.eval()
    try:
        with torch.no_grad(), without_cache(model):
            calls = [
                (labels, examples.call(model, **labels))
                for labels in likeliest.made_up_labels(output)
            ]
    except Exception as error:  # noqa: BLE001 - whatever a model's own code may raise
        reason = f"its forward takes no labels as made up: {first_line(error)}"
        return None, (f"the loss of {type(model).__name__} is not known: {reason}",)
    for loss in chain([likeliest], losses):
        if all(_agrees(loss, labels, computed) for labels, computed in calls):
            return loss, ()
    return None, (f"the loss of {type(model).__name__} is not known: it computes another one",)


def _agrees(loss: ModelLoss, labels: Mapping[str, torch.Tensor], computed: Any) -> bool:
    """Whether a loss is the one that the model's forward computed from labels."""
    expected = computed.get("loss")
    if expected is None:
        return False
    try:
        actual = loss(computed, labels)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # it is the loss of other outputs or labels
    tolerance = _RELATIVE.get(expected.dtype, 1e-2)
    return actual.dtype == expected.dtype and torch.allclose(
        actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True
    )
