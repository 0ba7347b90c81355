"""`torch.export` of a model on its examples, with as many dynamic sizes as the model allows."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from bone_fx.capture.stamping.plain_layers import equal_layers_once, write_layers_out
from bone_fx.capture.trace.default_inputs import missing_inputs
from bone_fx.capture.trace.dynamic_axes import fixed_dims, reason_line, user_inputs
from bone_fx.capture.trace.examples import Examples
from bone_fx.capture.trace.flat_call import flat_forward
from bone_fx.capture.trace.hf_model import is_transformers_model, traceable
from bone_fx.capture.trace.modes import settings_to_blame
from bone_fx.errors import CaptureError, first_line

DynamicShapes = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Attributes:
        program: What `torch.export` gave.
        examples: The examples it was given, which say what varies.
        notes: Which sizes were meant to vary and do not, with the reason.
    """

    program: ExportedProgram
    examples: Examples
    notes: tuple[str, ...]


def trace(
    model: torch.nn.Module,
    examples: Examples,
    dynamic_shapes: DynamicShapes | None = None,
    *,
    stamp: bool = False,
) -> Trace:
    """Traces `model` with the most dynamic sizes that it allows.

    Args:
        model: The model, in the mode to trace.
        examples: Its example inputs.
        dynamic_shapes: `torch.export`'s own, instead of what the examples say varies.
        stamp: Trace equal layers once.

    Raises:
        CaptureError: It cannot be traced.
    """
    first: Exception | None = None
    for choice, shapes in choices_of_sizes(model, examples, dynamic_shapes):
        try:
            program = _export(model, choice, shapes, stamp=stamp)
        except Exception as error:  # noqa: BLE001 -- whatever the model or the tracer raises is a refusal
            first = first or error
            continue
        notes = () if first is None else _fixed(choice, program, first)
        return Trace(program, choice, notes)
    assert first is not None
    if isinstance(first, CaptureError):
        raise first
    why, avoid = first_line(first), "see the error that this one comes from"
    if type(first).__name__ == "GuardOnDataDependentSymNode":
        why = f"its forward branches on the values of a tensor{_line_of(first)}"
        avoid = "compute both sides and choose with torch.where: a graph holds one path"
    advice = missing_inputs(model, examples.inputs, first)
    raise CaptureError(
        f"{type(model).__name__} cannot be captured: {why}",
        **{"next_step": settings_to_blame(model) or avoid, **advice},
    ) from first


def choices_of_sizes(
    model: torch.nn.Module, examples: Examples, dynamic_shapes: DynamicShapes | None
) -> list[tuple[Examples, dict[str, Any]]]:
    """What to trace in turn until one works, with `torch.export`'s dynamic shapes for each.

    First all varies that should; then what of it the model allows; and at last, for a model that is
    not of transformers, nothing.

    Args:
        model: The model.
        examples: Its example inputs.
        dynamic_shapes: The caller's own, which are the only choice.
    """
    as_given = replace(examples, inputs=examples.as_given)
    if dynamic_shapes is not None:
        shapes = (
            dynamic_shapes
            if isinstance(dynamic_shapes, Mapping)
            else dict(zip(examples.inputs, dynamic_shapes, strict=False))
        )
        return [(as_given, {name: shapes.get(name) for name in examples.inputs})]
    choices = [(examples, examples.dynamic_shapes(dim)) for dim in (Dim.DYNAMIC, Dim.AUTO)]
    if not is_transformers_model(model):
        static = replace(as_given, varying={})
        choices.append((static, static.dynamic_shapes(None)))
    return choices


def _export(
    model: torch.nn.Module, examples: Examples, shapes: dict[str, Any], *, stamp: bool
) -> ExportedProgram:
    inputs = {name: copy.copy(value) for name, value in examples.inputs.items()}
    once = equal_layers_once(model) if stamp else nullcontext()
    with traceable(model), flat_forward(model, examples), once, torch.enable_grad():
        try:
            program = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)
        finally:
            _let_go()
    write_layers_out(program)
    return program


def _let_go() -> None:
    """PyTorch 2.13 holds on to the nodes of the last trace, and through them to its graph."""
    from torch.fx.experimental import proxy_tensor

    getattr(proxy_tensor, "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT", {}).clear()


def _fixed(examples: Examples, program: ExportedProgram, reason: Exception) -> tuple[str, ...]:
    """Says which dimensions that were meant to vary do not."""
    if not examples.varying:
        return (f"every size is fixed at the example's: {reason_line(reason)}",)
    return fixed_dims(user_inputs(program), examples.varying, reason)


def _line_of(error: Exception) -> str:
    """Where in the model's code, as the tracer says it (torch 2.13)."""
    places = re.findall(r'File "(.+)", line (\d+), in ', str(error))
    return f", at {places[-1][0]}:{places[-1][1]}" if places else ""
