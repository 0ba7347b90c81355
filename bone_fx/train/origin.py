"""Where an adapted module comes from: a model, captured to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from bone_fx.capture.call.signature import CallSignature
from bone_fx.capture.trace.default_inputs import default_inputs
from bone_fx.capture.trace.hf_model import is_transformers_model
from bone_fx.capture.training.capture_training import capture_training
from bone_fx.capture.training.loss import ModelLoss
from bone_fx.config import BoneConfig
from bone_fx.errors import UsageError
from bone_fx.sites import output_layers


@dataclass
class Origin:
    """Where an adapted module comes from.

    Attributes:
        graph_module: The pristine captured graph, in train mode.
        signature: How it is called.
        model: The model it was captured from, untouched; `merge_and_unload` copies it.
        loss: The model's own loss of an output and labels, or None.
        untie: Whether tied weights may be targets.
        freeze_base: Whether every parameter but blocks and `modules_to_save` is frozen.
        recompute: Whether backward folds BAT's weights again instead of keeping them.
    """

    graph_module: fx.GraphModule
    signature: CallSignature
    model: nn.Module | None = None
    loss: ModelLoss | None = None
    untie: bool = False
    freeze_base: bool = True
    recompute: bool = True

    def output_layers(self, config: BoneConfig) -> frozenset[str]:
        """Sites that `"all-linear"` leaves out for an adapter: its task has a part in it."""
        return frozenset() if self.model is None else output_layers(self.model, config.task_type)


def capture_origin(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None,
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    untie: bool = False,
    freeze_base: bool = True,
    recompute: bool = True,
) -> Origin:
    """Capture a model to put adapters on it.

    Args:
        model: A transformers model or any module that `torch.export` takes; it is left as it was.
        example_inputs: One call's arguments; None makes those of a transformers model up.
        dynamic_shapes: `torch.export`'s own, instead of a dynamic batch and length.
        untie: As in `Origin`.
        freeze_base: As in `Origin`.
        recompute: As in `Origin`.

    Raises:
        CaptureError: The model cannot be captured, or its capture would not be the model.
        UsageError: The example inputs do not fit the model, or cannot be made up.
    """
    if example_inputs is None:
        if not is_transformers_model(model):
            raise UsageError(
                f"example inputs of {type(model).__name__} cannot be made up",
                expected="the arguments of one call; their values do not matter",
                next_step="pass example_inputs=",
            )
        example_inputs = default_inputs(model)
    capture = capture_training(model, example_inputs, dynamic_shapes=dynamic_shapes)
    return Origin(
        graph_module=capture.graph_module,
        signature=capture.signature,
        model=model,
        loss=capture.loss,
        untie=untie,
        freeze_base=freeze_base,
        recompute=recompute,
    )
