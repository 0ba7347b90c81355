"""From the example inputs of a caller to what is traced: which arguments, which sizes vary.

Labels go, flags and numbers become constants of the graph, a text model gets its attention mask,
and a size of one that is to vary becomes two (`torch.export` takes a one for a constant). With
`position_ids` and `attention_mask=None` there is no mask: transformers finds packed sequences by
their positions then.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bone_fx.capture.trace.hf_model import LABEL_NAMES, is_transformers_model
from bone_fx.errors import UsageError

BATCH = "batch"
_LENGTH_INPUTS = ("inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states", "input_values")
"""Floating-point inputs whose dimension 1 is a length, as it is in all 2-D integer inputs."""
_MASK = "attention_mask"
_MASKED_BY = {
    _MASK: ("input_ids", "inputs_embeds", "input_values"),
    "decoder_attention_mask": ("decoder_input_ids", "decoder_inputs_embeds"),
}


@dataclass(frozen=True)
class Examples:
    """What is traced.

    Attributes:
        inputs: The arguments that become inputs of the graph, in order.
        constants: The arguments whose values become part of the graph.
        varying: For each input, its dimensions that vary: `{dimension: role}`, the role "batch" or
            "length".
        ones_like: For each 2-D attention mask, the input whose first two sizes a mask of ones
            takes.
        positional: The names that positional arguments stand for.
        by_position: How many of the arguments are handed over by position.
        as_given: `inputs` before any size of one became two.
    """

    inputs: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    varying: dict[str, dict[int, str]] = field(default_factory=dict)
    ones_like: dict[str, str] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    by_position: int = 0
    as_given: dict[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        """The inputs and constants as keyword arguments."""
        return {**self.inputs, **self.constants}

    def call(self, model: torch.nn.Module, **more: Any) -> Any:
        """Calls a model with the inputs, constants and other keywords, by position as given."""
        values = self.keywords()
        args = [values.pop(name, None) for name in self.positional[: self.by_position]]
        return model(*args, **values, **more)

    def dynamic_shapes(self, dim: Any) -> dict[str, Any]:
        """`torch.export`'s own, with `dim` wherever a size is to vary; None: nothing varies."""

        def of(name: str) -> Any:
            varying = self.varying.get(name)
            if varying and dim is not None:
                return dict.fromkeys(varying, dim)
            return pytree.tree_map_only(torch.Tensor, lambda _: None, self.inputs[name])

        return {name: of(name) for name in self.inputs}


def read_examples(
    model: torch.nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor
) -> Examples:
    """Sorts the example inputs of `model`; see the module's description.

    Args:
        model: A transformers model or any module.
        example_inputs: Keyword arguments, or positional ones, of its forward.

    Raises:
        UsageError: The inputs do not fit the forward, or hold no tensor.
    """
    arguments, positional, by_position = _by_name(model, example_inputs)
    arguments = _beside_the_model(model, arguments)
    transformers = is_transformers_model(model)
    labels = (
        {name: arguments.pop(name) for name in LABEL_NAMES if name in arguments}
        if transformers
        else {}
    )
    if transformers:
        arguments.pop("use_cache", None)
        arguments.pop("return_dict", None)
        _refuse_cache(arguments)
    inputs = {name: value for name, value in arguments.items() if _has_tensor(value)}
    constants = {
        name: value for name, value in arguments.items() if name not in inputs and value is not None
    }
    if not inputs:
        raise UsageError(
            "the example inputs hold no tensor",
            expected="the arguments of one call",
            found=list(arguments),
        )
    ones_like: dict[str, str] = {}
    if transformers:
        _add_decoder_inputs(model, inputs, labels)
        is_packed = "position_ids" in inputs and arguments.get(_MASK, inputs) is None
        ones_like = _add_masks(inputs, set(positional) - ({_MASK} if is_packed else set()))
    varying = _varying(inputs, lengths=transformers)
    return Examples(
        inputs=_without_ones(inputs, varying),
        constants=constants,
        varying=varying,
        ones_like=ones_like,
        positional=positional,
        by_position=by_position,
        as_given=inputs,
    )


def _beside_the_model(model: torch.nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are all on the CPU, on the device of a model that is all on another."""
    devices = {parameter.device for parameter in model.parameters()}
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    if len(devices) != 1 or not all(tensor.device.type == "cpu" for tensor in tensors):
        return arguments
    (device,) = devices
    if device.type in ("cpu", "meta"):
        return arguments
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), arguments)  # type: ignore[no-any-return]


def _by_name(
    model: torch.nn.Module, example_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor
) -> tuple[dict[str, Any], tuple[str, ...], int]:
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(example_inputs, Mapping):
        unknown = [n for n in example_inputs if n not in {p.name for p in parameters}]
        if unknown and not any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise UsageError(
                f"{type(model).__name__} has no argument {', '.join(unknown)}",
                expected=", ".join(named),
                found=unknown,
            )
        return dict(example_inputs), tuple(named), 0
    values = [example_inputs] if isinstance(example_inputs, torch.Tensor) else list(example_inputs)
    star = next((p.name for p in parameters if p.kind == p.VAR_POSITIONAL), None)
    if star is not None:
        named += [f"{star}_{i}" for i in range(len(values) - len(named))]
    if len(values) > len(named):
        raise UsageError(
            f"{type(model).__name__} takes {len(named)} positional arguments",
            expected=named,
            found=len(values),
        )
    return dict(zip(named, values, strict=False)), tuple(named), len(values)


def _refuse_cache(arguments: dict[str, Any]) -> None:
    if arguments.get("past_key_values") is not None:
        raise UsageError(
            "past_key_values in the example inputs",
            expected="inputs of a training step, which has no cache",
            next_step="leave past_key_values out",
        )


def _has_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _add_decoder_inputs(
    model: torch.nn.Module, inputs: dict[str, Any], labels: dict[str, Any]
) -> None:
    """An encoder-decoder makes the decoder inputs that it lacks from the labels: so do we."""
    names = {"decoder_input_ids", "decoder_inputs_embeds"}
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None and labels.get("labels") is not None and not names & set(inputs):
        inputs["decoder_input_ids"] = shift(labels["labels"])


def _add_masks(inputs: dict[str, Any], parameters: set[str]) -> dict[str, str]:
    """A mask is always an input of the graph: with none in the examples, one of ones."""
    ones_like: dict[str, str] = {}
    for mask, candidates in _MASKED_BY.items():
        like = next((name for name in candidates if name in inputs), None)
        if like is None or mask not in parameters:
            continue
        text = not like.endswith("input_values")
        if mask == _MASK and text and mask not in inputs:
            shape = inputs[like].shape[:2]
            inputs[mask] = torch.ones(shape, dtype=torch.long, device=inputs[like].device)
        if mask in inputs and inputs[mask].dim() == 2:
            ones_like[mask] = like
    return ones_like


def _varying(inputs: dict[str, Any], *, lengths: bool) -> dict[str, dict[int, str]]:
    """Dimension 0 is the batch where all agree on it; transformers' inputs also have lengths."""
    tensors = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.dim()
    }
    first = next(iter(tensors.values()), None)
    rows = (
        max((t.shape[0] for t in tensors.values()), default=0)
        if lengths
        else (0 if first is None else first.shape[0])
    )
    varying: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        one_for_all = lengths and tensor.shape[0] == 1 and not tensor.is_floating_point()
        if tensor.shape[0] != rows and not one_for_all:
            continue
        varying[name] = {0: BATCH}
        if not lengths:
            continue
        tokens = tensor.dim() == 2 and (not tensor.is_floating_point() or name.endswith("mask"))
        if tokens or (name in _LENGTH_INPUTS and tensor.dim() > 1):
            varying[name][1] = "length"
        elif name.endswith("attention_mask") and tensor.dim() == 4:
            varying[name].update({2: "length", 3: "length"})
    return varying


def _without_ones(inputs: dict[str, Any], varying: dict[str, dict[int, str]]) -> dict[str, Any]:
    """Repeats along each varying dimension of size one; a batch of one becomes two rows."""
    rows = max((inputs[name].shape[0] for name in varying), default=0)
    result = dict(inputs)
    for name, dimensions in varying.items():
        value = inputs[name]
        for axis, role in dimensions.items():
            if value.shape[axis] == 1:
                times = [1] * value.dim()
                times[axis] = max(rows, 2) if role == BATCH else 2
                value = value.repeat(times)
        result[name] = value
    return result
