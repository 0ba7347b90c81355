"""Sequences of parts, which have no CUDA kernel, as the Split that they stand for."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.share_constants import add_constant, constant_value


class LowerSplitSequences(ir.passes.InPlacePass):
    """Replaces a sequence of parts of which each is taken by number.

    Before: `s = SplitToSequence(x [b, 12], 4)`, `y = SequenceAt(s, 0)`, `z = SequenceAt(s, 2)`
    After:  `y, _, z = Split(x, [4, 4, 4])`

    Only where the sizes are known.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph."""
        modified = False
        for node in list(model.graph):
            sizes = _sizes(node)
            if sizes is None:
                continue
            taken = [(use.node, _number(use.node, len(sizes))) for use in node.outputs[0].uses()]
            if any(number is None for _, number in taken) or node.outputs[0].is_graph_output():
                continue
            self._lower(model.graph, node, sizes, [(n, k) for n, k in taken if k is not None])
            modified = True
        return ir.passes.PassResult(model, modified)

    @staticmethod
    def _lower(
        graph: ir.Graph, node: ir.Node, sizes: list[int], taken: list[tuple[ir.Node, int]]
    ) -> None:
        given = add_constant(graph, ir.tensor(sizes, dtype=ir.DataType.INT64).numpy())
        split = ir.node(
            "Split", [node.inputs[0], given], {"axis": _axis(node)}, num_outputs=len(sizes)
        )
        graph.insert_before(node, split)
        for part, number in taken:
            old, new = part.outputs[0], split.outputs[number]
            new.shape, new.type = new.shape or old.shape, new.type or old.type
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            graph.remove(part, safe=True)
        graph.remove(node, safe=True)


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return 0 if axis is None else axis.as_int()


def _sizes(node: ir.Node) -> list[int] | None:
    """Sizes of the parts that a SplitToSequence makes; None if unknown, or for another node."""
    if (node.domain, node.op_type) != ("", "SplitToSequence") or len(node.inputs) < 2:
        return None
    given = constant_value(node.inputs[1])
    if given is None:
        return None
    if given.ndim:
        return [int(size) for size in given]
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    length = shape[_axis(node)] if shape is not None else None
    if not isinstance(length, int):
        return None
    size = int(given)
    return [min(size, length - start) for start in range(0, length, size)]


def _number(node: ir.Node, parts: int) -> int | None:
    """Which part a SequenceAt takes; None if unknown, or for another node."""
    if (node.domain, node.op_type) != ("", "SequenceAt"):
        return None
    number = constant_value(node.inputs[1])
    if number is None or not -parts <= int(number) < parts or node.outputs[0].is_graph_output():
        return None
    return int(number) % parts
