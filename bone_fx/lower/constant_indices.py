"""Lookups by a constant list of one index, written as slices.

Before (`x[:, :, [-2]]`, x [B, S, 6, D]):
    indices: lift_fresh_copy(constant [-2])
    y:       [B, S, 1, D] = index(x, [None, None, indices])

After:
    y:       [B, S, 1, D] = slice(x, 2, 4, 5)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

aten = torch.ops.aten


def slice_by_constants(program: ExportedProgram) -> None:
    """Replaces such lookups, in place."""
    kinds = (InputKind.CONSTANT_TENSOR, InputKind.BUFFER)
    constants = {
        spec.arg.name: program.constants.get(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in kinds and spec.target is not None
    }
    for node in program.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        place = _axis_and_index(node, constants)
        if place is None:
            continue
        x, (axis, index) = node.args[0], place
        size = x.meta["val"].shape[axis]
        if not isinstance(size, int) or not -size <= index < size:
            continue
        start = index % size
        with program.graph.inserting_before(node):
            cut = program.graph.call_function(aten.slice.Tensor, (x, axis, start, start + 1))
        cut.meta = dict(node.meta)
        node.replace_all_uses_with(cut)
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()


def _axis_and_index(node: Node, constants: dict[str, Tensor | None]) -> tuple[int, int] | None:
    indices = node.args[1]
    assert isinstance(indices, list | tuple)
    indexed = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(indexed) != 1:
        return None
    axis, index = indexed[0]
    while isinstance(index, Node) and index.target in (
        aten.lift_fresh_copy.default,
        aten.clone.default,
        aten.detach.default,
    ):
        index = index.args[0]
    value = constants.get(index.name) if isinstance(index, Node) else None
    if value is None or value.shape != (1,) or value.dtype not in (torch.int64, torch.int32):
        return None
    return axis, int(value)
