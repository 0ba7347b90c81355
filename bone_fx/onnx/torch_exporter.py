"""Everything that touches `torch.onnx`'s exporter, private parts included, but for its registry.

Tried with torch 2.13.0 and onnxscript 0.7.2. The public entry point decomposes every program before
it translates it; here a prepared graph (`bone_fx.onnx.prepare`) is handed to the translator as it
is, and operators without a translation are decomposed one by one. What only the whole program's
functionalization can rewrite (a view that is changed in place, a region) goes through
`torch.onnx.export`, which is slower and equally right.
"""

from __future__ import annotations

import copy
import functools
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument
from torch.fx import GraphModule, Node

from bone_fx.errors import BoneFxError, ExportError, first_line
from bone_fx.onnx.aten import gelu, scaled_attention
from bone_fx.onnx.prepare import prepare
from bone_fx.onnx.prepare.decompose import decompose_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 18
"""Opset of torchlib, for which no CUDA kernel is missing."""


def program_to_ir(program: ExportedProgram) -> tuple[ir.Model, str | None]:
    """Translates a program whose parameters may be fake; initializers carry the program's names.

    Returns:
        The model, and why the program had to be decomposed: None if it was translated as it is.

    Raises:
        ExportError: An operator has no translation even when decomposed.
    """
    with _quiet():
        try:
            return _program_to_ir(program)
        except (BoneFxError, MemoryError):
            raise
        except Exception as error:
            raise _explained(error) from error


def _program_to_ir(program: ExportedProgram) -> tuple[ir.Model, str | None]:
    registry = _registry()
    prepared = prepare(program.graph_module)
    if decompose_nodes(prepared, lambda node: _has_no_translation(node, registry)):
        prepared = prepare(prepared)
    reason = _untranslatable(prepared, registry)
    if reason is None:
        return _translate(program, prepared, registry), None
    return _export(program, _own_translations(registry)), reason


@functools.cache
def _registry() -> Any:
    from bone_fx.onnx.aten.torchlib import TorchLib

    registry = TorchLib()
    for target, function in _own_translations(registry).items():
        registry.register_op(target, function)
    return registry


def _own_translations(registry: Any) -> dict[Any, Any]:
    def torchlib(target: Any) -> Any:
        return next(e.onnx_function for e in registry.get_decomps(target) if not e.is_custom)

    return {
        **scaled_attention.translations(torchlib(scaled_attention.SDPA), _contrib),
        **gelu.translations(torchlib(gelu.GELU), _contrib),
    }


def _contrib(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: dict[str, Any],
    dtype: ir.DataType,
) -> ir.Value:
    """Records an operator of ONNX Runtime's own, of one output, as the translator does its own."""
    import onnx_ir as ir
    from torch.onnx._internal.exporter import _core

    from bone_fx.onnx.kernels import CONTRIB

    node = ir.node(op_type, inputs, attributes, domain=CONTRIB, version=1)
    node.outputs[0].dtype = dtype
    assert _core.current_tracer is not None
    _core.current_tracer.nodes.append(node)
    return node.outputs[0]


def _untranslatable(graph_module: GraphModule, registry: Any) -> str | None:
    """What in a prepared graph the translator cannot take as it is."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and not _is_tensor(node):
            return f"region {next(iter(node.users)).target}"
        if node.op == "call_module":
            return f"call of {node.target}"
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            if node.target.namespace == "onnx":
                continue
            if node.target._schema.is_mutable:
                return f"{node.target} changes {node.args[0]} in place"
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"region {node.target}"
        if _has_no_translation(node, registry):
            return f"no translation of {node.target}"
    return None


def _has_no_translation(node: Node, registry: Any) -> bool:
    from torch.onnx._internal.exporter._dispatching import dispatch

    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "onnx":
        return False
    return dispatch(node, registry)[0] is None


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _translate(program: ExportedProgram, graph_module: GraphModule, registry: Any) -> ir.Model:
    from torch.onnx._internal.exporter import _core

    shadow = copy.copy(program)
    shadow._graph_module = graph_module
    shadow._graph_signature = _signature_of(program, graph_module)
    return _core._exported_program_to_onnx_program(shadow, registry=registry).model


def _signature_of(program: ExportedProgram, graph_module: GraphModule) -> ExportGraphSignature:
    """The program's signature with the names that outputs have in the prepared graph."""
    signature = program.graph_signature
    outputs = graph_module.graph.output_node().args[0]
    assert isinstance(outputs, (list, tuple))
    specs = [
        replace(spec, arg=TensorArgument(name=node.name)) if isinstance(node, Node) else spec
        for spec, node in zip(signature.output_specs, outputs, strict=True)
    ]
    return ExportGraphSignature(list(signature.input_specs), specs)


def _export(program: ExportedProgram, table: dict[Any, Any]) -> ir.Model:
    exported = torch.onnx.export(
        program,
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        verbose=False,
        custom_translation_table=table,
    )
    assert exported is not None
    return exported.model


def _explained(error: BaseException) -> ExportError:
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return ExportError(
        "the graph could not be translated to ONNX",
        found=first_line(cause),
        next_step="replace the operator that is named, or report it with the model's configuration",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks about absent packages and itself away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
