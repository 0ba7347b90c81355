"""Where an adapted module comes from: a model, captured to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bone_fx.capture.call.signature import CallSignature
from bone_fx.capture.trace.default_inputs import LENGTH, ROWS, default_inputs
from bone_fx.capture.trace.hf_model import is_transformers_model
from bone_fx.capture.training.capture_training import capture_training
from bone_fx.capture.training.loss import ModelLoss
from bone_fx.config import BoneConfig
from bone_fx.errors import UsageError
from bone_fx.progress import WORTH_SHOWING, Progress, Silent, telling
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
        made_up: Whether the example inputs were: then a call may bring others.
        progress: Gets the stages of such a capture.
    """

    graph_module: fx.GraphModule
    signature: CallSignature
    model: nn.Module | None = None
    loss: ModelLoss | None = None
    untie: bool = False
    freeze_base: bool = True
    recompute: bool = True
    made_up: bool = False
    progress: Progress = field(default_factory=Silent, repr=False)

    def packs(self, tensors: Mapping[str, Tensor], use_cache: bool | None) -> bool:
        """Whether the model reads a call's rows as packed sequences: places, no mask, no cache.

        Raises:
            UsageError: They are, and the model keeps a state beside its attention.
        """
        config = getattr(self.model, "config", None)
        if use_cache is None:
            use_cache = getattr(config, "use_cache", True)
        if use_cache or "position_ids" not in tensors or "attention_mask" in tensors:
            return False
        kinds = set(getattr(config, "layer_types", None) or ())
        if recurrent := {k for k in kinds if not k.endswith("attention") or k.startswith("linear")}:
            raise UsageError(
                "packed sequences would run into one another in a layer with a state",
                expected="layers of attention alone",
                found=sorted(recurrent),
                next_step="train with packing=False",
            )
        return True

    def for_call(self, tensors: Mapping[str, Tensor], *, is_packed: bool) -> Origin:
        """The same model, captured for a call that brings other inputs.

        Args:
            tensors: What the call brings, by name.
            is_packed: Whether its rows are packed sequences.

        Raises:
            CaptureError: The model cannot be captured with them.
            UsageError: They do not fit the model.
        """
        assert self.model is not None
        device = next((p.device for p in self.model.parameters()), None)
        small = {name: value.detach().to(device) for name, value in _small(tensors).items()}
        examples = {**({"attention_mask": None} if is_packed else {}), **small}
        kinds = {tensor.device.type for tensor in tensors.values()}
        with ExitStack() as outside:  # a trainer calls under autocast
            for kind in kinds:
                outside.enter_context(torch.autocast(kind, enabled=False))
            capture = capture_training(self.model, examples, progress=self.progress)
        return replace(self, graph_module=capture.graph_module, signature=capture.signature)

    def output_layers(self, config: BoneConfig) -> frozenset[str]:
        """Sites that `"all-linear"` leaves out for an adapter: its task has a part in it."""
        return frozenset() if self.model is None else output_layers(self.model, config.task_type)


def _small(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first rows and tokens of a call's text: a trace wants its sizes to vary, not its size.

    A mask of two dimensions is one of ones, since what is left may have been all padding.
    """
    text = tensors.get("input_ids", tensors.get("inputs_embeds"))
    if text is None or text.dim() < 2:
        return dict(tensors)
    rows, length = text.shape[:2]
    small = {}
    for name, tensor in tensors.items():
        cut = tensor[:ROWS] if tensor.dim() and len(tensor) == rows else tensor
        if cut.dim() > 1 and cut.shape[1] == length and _is_counted(name, cut):
            cut = cut[:, :LENGTH]
        if cut.dim() == 4 and cut.shape[2:] == (length, length):
            cut = cut[:, :, :LENGTH, :LENGTH]
        is_mask = name.endswith("mask") and cut.dim() == 2
        small[name] = torch.ones_like(cut) if is_mask else cut
    return small


def _is_counted(name: str, tensor: Tensor) -> bool:
    """Whether dimension 1 of a tensor counts tokens: of numbers of them, masks, embeddings."""
    return not tensor.is_floating_point() or name.endswith(("mask", "embeds"))


def check_model(model: object) -> None:
    """Refuse what is no module, such as the name of a model.

    Raises:
        UsageError: It is none.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"a model is needed, not {type(model).__name__}",
            expected="a torch.nn.Module, before the adapter",
            found=repr(model)[:80],
            next_step="load it, as with AutoModelForCausalLM.from_pretrained(...)",
        )


def capture_origin(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | None,
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    untie: bool = False,
    freeze_base: bool = True,
    recompute: bool = True,
    progress: Progress | bool = True,
) -> Origin:
    """Capture a model to put adapters on it.

    Args:
        model: A transformers model or any module that `torch.export` takes; it is left as it was.
        example_inputs: One call's arguments; None makes those of a transformers model up.
        dynamic_shapes: `torch.export`'s own, instead of a dynamic batch and length.
        untie: As in `Origin`.
        freeze_base: As in `Origin`.
        recompute: As in `Origin`.
        progress: True tells the stages on stderr, if the model is large enough to wait for.

    Raises:
        CaptureError: The model cannot be captured, or its capture would not be the model.
        UsageError: The example inputs do not fit the model, or cannot be made up.
    """
    told = telling(progress)
    if progress is True and sum(p.nbytes for p in model.parameters()) < WORTH_SHOWING:
        told = Silent()
    made_up = example_inputs is None
    if example_inputs is None:
        if not is_transformers_model(model):
            raise UsageError(
                f"example inputs of {type(model).__name__} cannot be made up",
                expected="the arguments of one call; their values do not matter",
                next_step="pass example_inputs=",
            )
        example_inputs = default_inputs(model)
    capture = capture_training(model, example_inputs, dynamic_shapes=dynamic_shapes, progress=told)
    return Origin(
        graph_module=capture.graph_module,
        signature=capture.signature,
        model=model,
        loss=capture.loss,
        untie=untie,
        freeze_base=freeze_base,
        recompute=recompute,
        made_up=made_up and dynamic_shapes is None,
        progress=told,
    )
