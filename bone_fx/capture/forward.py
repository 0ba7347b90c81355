"""Capture for deployment of anything but a decoder: a forward in evaluation mode.

Taken are a transformers model (its parameters may be fake), a user's own module, a GraphModule from
`symbolic_trace` or `torch.export`, and an ExportedProgram as it is. What comes out has flat tensors
with names on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from bone_fx.capture.flat_outputs import different_from, flat_outputs
from bone_fx.capture.trace.default_inputs import default_inputs, missing_inputs
from bone_fx.capture.trace.dynamic_axes import (
    Roles,
    fixed_dims,
    name_dims,
    reason_line,
    roles_of,
    user_inputs,
)
from bone_fx.capture.trace.examples import BATCH, Examples, read_examples
from bone_fx.capture.trace.flat_call import flat_forward
from bone_fx.capture.trace.hf_model import is_transformers_model, traceable
from bone_fx.capture.trace.restoring import unchanged
from bone_fx.capture.trace.tracing import DynamicShapes, choices_of_sizes
from bone_fx.errors import BoneFxError, CaptureError, UsageError
from bone_fx.graphs import copy_graph
from bone_fx.passes.dropout import set_dropout

ExampleInputs = Mapping[str, Any] | Sequence[Any] | torch.Tensor


@dataclass(frozen=True)
class ForwardCapture:
    """A model's forward, ready to be translated.

    Attributes:
        program: Flat tensors in and out; parameters and buffers under the model's names, fake where
            the model's were.
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order: fields of a transformers output
            (`last_hidden_state`, `logits`).
        dim_names: For inputs, the names of the dimensions that vary.
        notes: What is fixed that was to vary, with the reason.
    """

    program: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dim_names: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def capture_forward(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic_shapes: DynamicShapes | None = None,
) -> ForwardCapture:
    """Captures a forward in evaluation mode; the model is as it was when this returns.

    Args:
        model: What to capture. A graph that was traced in training mode is switched to evaluation
            on a copy.
        example_inputs: Arguments of one call, by name or by position; their values do not matter. A
            transformers model needs none. Its batch and lengths become dynamic and a 2-D attention
            mask is always an input; for another module dimension 0 of every tensor that agrees with
            the first one's is dynamic.
        dynamic_shapes: Instead of that choice, `torch.export`'s own `dynamic_shapes` for the
            example inputs.

    Raises:
        CaptureError: The model cannot be traced, or a dimension that was asked to vary cannot.
        UsageError: The example inputs do not fit, or there are none where they are needed.
    """
    if isinstance(model, ExportedProgram):
        return _from_program(model)
    if example_inputs is None:
        if not is_transformers_model(model):
            raise UsageError(
                f"{type(model).__name__} cannot be captured without example inputs",
                next_step="pass example_inputs=(x,) with the arguments of one call",
            )
        example_inputs = default_inputs(model)
    if isinstance(model, GraphModule):
        model = _shell(evaluation_copy(model))
    with unchanged(model), torch.no_grad():
        torch.nn.Module.train(
            model, False
        )  # not model.eval(), which raises on what torch.export made
        examples = read_examples(model, example_inputs)
        return _capture(model, examples, dynamic_shapes)


def _capture(
    model: torch.nn.Module, examples: Examples, dynamic_shapes: DynamicShapes | None
) -> ForwardCapture:
    transformers = is_transformers_model(model)
    attempts = choices_of_sizes(model, examples, dynamic_shapes)
    roles: Roles = examples.varying if dynamic_shapes is None else roles_of(attempts[0][1])
    first: Exception | None = None
    for choice, shapes in attempts:
        try:
            capture = _export(model, choice, shapes, roles)
        except BoneFxError:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever is raised is a refusal
            first = first or error
            continue
        if capture.notes and (transformers or dynamic_shapes is not None):
            raise CaptureError(
                f"{type(model).__name__} does not run at every size: {capture.notes[0]}",
                next_step="pass dynamic_shapes, with None for the dimensions that may be fixed",
            ) from first
        return capture
    assert first is not None
    asked = f" with dynamic_shapes {dynamic_shapes}" if dynamic_shapes is not None else ""
    step = "see the error that this one comes from for the line in the model"
    advice = missing_inputs(model, examples.inputs, first)
    raise CaptureError(
        f"{type(model).__name__} cannot be captured{asked}: {reason_line(first)}",
        **{"next_step": step, **advice},
    ) from first


def _export(
    model: torch.nn.Module, examples: Examples, shapes: dict[str, Any], roles: Roles
) -> ForwardCapture:
    outputs: list[tuple[str, ...]] = []
    inputs = _traced_inputs(model, examples)

    def flattened(output: Any) -> tuple[torch.Tensor, ...]:
        tensors, names = flat_outputs(output)
        if not tensors:
            raise CaptureError(f"{type(model).__name__} returns no tensor")
        outputs.append(names)
        return tensors

    with traceable(model), flat_forward(model, examples, flattened):
        program = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)
    names = tuple(
        f"{name}.{place}" if nested else name
        for name, value in examples.inputs.items()
        for nested in [not isinstance(value, torch.Tensor)]
        for place, _ in enumerate(_tensors(value))
    )
    tensors = dict(zip(names, user_inputs(program).values(), strict=True))
    return ForwardCapture(
        program,
        input_names=names,
        output_names=different_from(outputs[-1], names),
        dim_names=name_dims(tensors, roles),
        notes=fixed_dims(tensors, roles, None),
    )


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _traced_inputs(model: torch.nn.Module, examples: Examples) -> dict[str, Any]:
    """Inputs of the example's sizes, in the fake mode of the parameters if they are fake."""
    mode = torch._guards.detect_fake_mode(list(model.parameters()))
    if mode is None:
        return dict(examples.inputs)
    with mode:
        return {
            name: pytree.tree_map_only(
                torch.Tensor, lambda t: torch.zeros(t.shape, dtype=t.dtype), value
            )
            for name, value in examples.inputs.items()
        }


def evaluation_copy(graph_module: GraphModule) -> GraphModule:
    """The graph on its own, without guards, in evaluation; parameters are shared."""
    graph = copy_graph(graph_module.graph)
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
    copied = GraphModule(graph_module, graph, type(graph_module).__name__)
    for spec in ("_in_spec", "_out_spec"):
        if hasattr(graph_module, spec):
            setattr(copied, spec, getattr(graph_module, spec))
    set_dropout(copied, training=False)
    return copied


def _shell(graph_module: GraphModule) -> torch.nn.Module:
    """A module with the graph's state: `torch.export` passes a GraphModule's `forward` over."""
    shell = torch.nn.Module()
    for owned in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
        shell.__dict__[owned] = graph_module.__dict__[owned]
    shell.__dict__["forward"] = graph_module.forward
    return shell


def _from_program(program: ExportedProgram) -> ForwardCapture:
    inputs = user_inputs(program)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    results = [values.get(str(name)) for name in program.graph_signature.user_outputs]
    assert program.call_spec.out_spec is not None
    _, names = flat_outputs(pytree.tree_unflatten(results, program.call_spec.out_spec))
    tensors = [value for value in inputs.values() if value.dim()]
    batch = {name: {0: BATCH} for name, v in inputs.items() if v.dim() and _same(v, tensors[0])}
    return ForwardCapture(
        program,
        input_names=tuple(inputs),
        output_names=different_from(names, inputs),
        dim_names=name_dims(inputs, batch),
    )


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return str(left.shape[0]) == str(right.shape[0])
