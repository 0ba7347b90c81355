"""Capture for training: a model's forward as an fx graph over the model's own parameters.

1. The example inputs are sorted (`capture.trace.examples`): labels go, masks are added, sizes of
   one become two.
2. `torch.export` (non-strict) traces the model in training mode, in the dtype it has, with a
   dynamic batch and length.
3. The graph gets a plain calling convention (flat tensors in, flat tensors out;
   `capture.call.signature` stands on both sides of it), loses the assertions of the trace, and
   takes over the model's parameters under their own names.
4. The graph with dropout off must be what the model computes in evaluation mode, or the capture is
   refused.
5. The loss that the model's class lets expect must be what the model computes from labels, or the
   capture has none.

The model is left as it was: modes, configuration, random states, gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from bone_fx.capture.call.from_trace import call_of_trace
from bone_fx.capture.call.signature import CallSignature
from bone_fx.capture.trace.examples import read_examples
from bone_fx.capture.trace.modes import (
    refuse_checkpointing,
    refuse_draws,
    refuse_own_backward,
    require_same_evaluation,
)
from bone_fx.capture.trace.restoring import unchanged
from bone_fx.capture.trace.tracing import DynamicShapes, trace
from bone_fx.capture.training.checked_loss import checked_loss
from bone_fx.capture.training.loss import ModelLoss
from bone_fx.capture.training.state import mount_state, name_as_used
from bone_fx.errors import CaptureError
from bone_fx.passes.dropout import remember_training
from bone_fx.passes.follow_device import follow_device
from bone_fx.passes.frame import Frame
from bone_fx.passes.inline_no_grad import inline_no_grad
from bone_fx.progress import Progress, Silent

# What the trace leaves behind to check the sizes and dtypes of the example: the call signature
# checks the inputs, and what was derived from them follows. (`_guards_fn` is not made at all:
# `module(check_guards=False)`.)
_TRACE_CHECKS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)

_READ_LATER = ("val", "nn_module_stack", "stack_trace")
"""What is kept of a node's metadata: the rest is how the trace came about, in every copy."""


@dataclass(frozen=True)
class TrainingCapture:
    """A model's forward as a graph, and how to call it.

    Attributes:
        graph_module: Flat tensors in, a tuple of tensors out; in training mode. Parameters and
            buffers are the model's own objects under the model's names, tied names included: each
            use reads a tied parameter under the name that the using module has for it.
        signature: Turns the model's calls into the graph's inputs, and the graph's outputs into the
            model's output.
        loss: The model's own loss on (output, labels), or None where the model has none that is
            known.
        notes: What the capture could not keep dynamic or not take over, with the reason.
    """

    graph_module: GraphModule
    signature: CallSignature
    loss: ModelLoss | None
    notes: tuple[str, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the graph's inputs, in order."""
        return self.signature.input_names

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the graph as the model is called (labels are passed over)."""
        return self.signature.call(self.graph_module, *args, **kwargs)


def capture_training(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor,
    *,
    dynamic_shapes: DynamicShapes | None = None,
    stamp: bool = True,
    progress: Progress | None = None,
) -> TrainingCapture:
    """Captures `model` in training mode.

    Args:
        model: A transformers model, or any module that `torch.export` takes.
        example_inputs: The arguments of one call, by name or by position. Their values do not
            matter. For a transformers model labels are taken out, and the batch and all lengths
            become dynamic; for another module dimension 0 of every tensor that agrees with the
            first one's does.
        dynamic_shapes: Instead of that choice, `torch.export`'s own `dynamic_shapes` for the
            example inputs.
        stamp: Trace equal layers once. The graph is the same without, and takes longer.
        progress: Gets the stages.

    Returns:
        The capture.

    Raises:
        CaptureError: The model cannot be captured, or its evaluation mode differs from its training
            mode by more than dropout; the setting that avoids it is named where it is known.
        UsageError: The example inputs do not fit the model.
    """
    graphs: list[GraphModule] = []
    capture = functools.partial(
        _capture, model, example_inputs, dynamic_shapes, graphs, progress or Silent()
    )
    if not stamp:
        return capture(stamp=False)
    try:
        return capture(stamp=True)
    except CaptureError as error:
        # Layers may leave something beside their output, or the model cannot be captured: then the
        # trace of every layer says why. If it gives the same graph, the model's results change.
        captured = capture(stamp=False)
        if len(graphs) > 1 and _operators(graphs[0]) == _operators(graphs[1]):
            raise error from None
        return captured


def _capture(
    model: torch.nn.Module,
    example_inputs: Mapping[str, Any] | Sequence[Any] | torch.Tensor,
    dynamic_shapes: DynamicShapes | None,
    graphs: list[GraphModule],
    progress: Progress,
    *,
    stamp: bool,
) -> TrainingCapture:
    """The capture; its graph is among `graphs` before it is tried."""
    refuse_checkpointing(model)
    with unchanged(model):
        model.train()
        progress.stage(f"trace {type(model).__name__}{'' if stamp else ', every layer'}")
        with refuse_draws(model), refuse_own_backward(model):
            examples = read_examples(model, example_inputs)
            traced = trace(model, examples, dynamic_shapes, stamp=stamp)
        graph_module = _plain_graph(traced.program)
        name_as_used(graph_module, model)
        mount_state(graph_module, model)
        signature = call_of_trace(model, traced, graph_module)
        remember_training(graph_module)
        graph_module.graph.lint()
        graph_module.recompile()
        graph_module.train()
        graphs.append(graph_module)
        progress.stage("compare the graph with the model")
        output = require_same_evaluation(model, graph_module, traced.examples)
        loss, notes = checked_loss(model, traced.examples, output)
        return TrainingCapture(graph_module, signature, loss, (*traced.notes, *notes))


def _operators(graph_module: GraphModule) -> list[str]:
    """The operators of a graph in order, and how many tensors it gives."""
    nodes = graph_module.graph.nodes
    outputs = sum(len(node.all_input_nodes) for node in nodes if node.op == "output")
    return [*(str(node.target) for node in nodes if node.op == "call_function"), str(outputs)]


def _plain_graph(program: torch.export.ExportedProgram) -> GraphModule:
    """The program's graph: parameters by name, flat inputs and outputs, no checks of the trace."""
    unlifted = program.module(check_guards=False)
    assert isinstance(unlifted, GraphModule)
    unlifted.graph.set_codegen(CodeGen())
    # A module of our own around the graph: on what `module()` gives, train() and eval() raise.
    graph_module = GraphModule(unlifted, unlifted.graph)
    _remove_trace_checks(graph_module)
    Frame(graph_module).run(inline_no_grad)
    for module in graph_module.modules():
        if module is not graph_module and isinstance(module, GraphModule):
            # Of an operator's region: no running form is made of it.
            Frame(module.graph).run(follow_device)
            module.recompile()
    for node in graph_module.graph.nodes:
        node.meta = {key: node.meta[key] for key in _READ_LATER if key in node.meta}
    return graph_module


def _remove_trace_checks(graph_module: GraphModule) -> None:
    """Removes the checks of the trace, also in the subgraphs of higher-order operators."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            for node in list(module.graph.nodes):
                if node.target in _TRACE_CHECKS and not node.users:
                    module.graph.erase_node(node)
            module.recompile()
