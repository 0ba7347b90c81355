"""From the exported program of a decoder to a tight graph with named constants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from bone_fx.capture.decoder.pasts import SharedPasts, describe_call, spread_pasts
from bone_fx.graphs import copy_graph
from bone_fx.lower.constant_indices import slice_by_constants
from bone_fx.lower.stamp import stamp
from bone_fx.lower.table import LAYER_PASSES, PASSES
from bone_fx.passes.frame import Frame
from bone_fx.passes.verifier import LOWERED, verify


def lower(program: ExportedProgram, shared: SharedPasts | None = None) -> None:
    """Tightens the graph of a program in place and drops constants that it no longer uses.

    Args:
        program: The trace of a decoder.
        shared: How layers share the inputs of the trace; None if they do not.
    """
    for node in program.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    slice_by_constants(program)
    # In a copy, names of new nodes do not depend on those of nodes that were erased up to here.
    program.graph_module.graph = copy_graph(program.graph)
    frame = Frame(program.graph, sweep=True)
    frame.run_table(LAYER_PASSES)
    if shared is not None:
        spread_pasts(program, shared)
    frame.run(stamp, _names(program))
    frame.run_table(PASSES)
    _drop_unused_constants(program)
    _rename_outputs(program)
    if shared is not None:
        describe_call(program, len(shared.of))
    verify(LOWERED, program.graph)
    program.graph.lint()
    program.graph_module.recompile()


def _names(program: ExportedProgram) -> dict[str, str]:
    """The names of parameters and buffers by the placeholders that stand for them."""
    kinds = (InputKind.BUFFER, InputKind.PARAMETER)
    return {
        s.arg.name: s.target
        for s in program.graph_signature.input_specs
        if s.kind in kinds and s.target is not None and isinstance(s.arg, TensorArgument)
    }


def _rename_outputs(program: ExportedProgram) -> None:
    """Puts the names of the nodes that are outputs now into the signature."""
    outputs = program.graph.output_node().args[0]
    assert isinstance(outputs, (list, tuple))
    for spec, node in zip(program.graph_signature.output_specs, outputs, strict=True):
        spec.arg = TensorArgument(name=node.name)


def _drop_unused_constants(program: ExportedProgram) -> None:
    placeholders = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    kept = []
    for spec in program.graph_signature.input_specs:
        node = placeholders.get(getattr(spec.arg, "name", ""))
        constant = spec.kind in (InputKind.BUFFER, InputKind.CONSTANT_TENSOR, InputKind.PARAMETER)
        if constant and node is not None and not node.users:
            program.graph.erase_node(node)
            continue
        kept.append(spec)
    program.graph_signature.input_specs[:] = kept


def columns(program: ExportedProgram) -> int:
    """Columns of the first output."""
    (logits, *_), *_ = program.graph.output_node().args
    return int(logits.meta["val"].shape[-1])


def constant_names(program: ExportedProgram) -> set[str]:
    """Names of the parameters, buffers and constants that the graph uses."""
    return {s.target for s in program.graph_signature.input_specs if s.target is not None}


def name_constants(
    program: ExportedProgram, rotary: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Names the rotary tables, and gives the values of the constants that are no parameters."""
    tables = {
        id(t): f"{kind}_cache{f'_{i}' if i else ''}"
        for i, pair in enumerate(rotary)
        for kind, t in zip(("cos", "sin"), pair, strict=True)
    }
    by_id = {id(t): t for pair in rotary for t in pair}
    constants: dict[str, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in (InputKind.CONSTANT_TENSOR, InputKind.BUFFER) or spec.target is None:
            continue
        value = program.constants.get(spec.target, program.state_dict.get(spec.target))
        if spec.kind == InputKind.CONSTANT_TENSOR and id(value) in tables:
            name = tables[id(value)]
            program.constants[name] = program.constants.pop(spec.target)
            spec.target = name
            value = by_id[id(value)]
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            constants[spec.target] = value
    return constants
