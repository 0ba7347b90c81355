"""Nodes that give back their input."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.shapes import equal_shapes


class RemoveNoOps(ir.passes.InPlacePass):
    """Removes casts to the same dtype, reshapes to the same shape, transposes that move nothing.

    Before: `y = Expand(x [batch, 4], shape) [batch, 4]`
    After:  `x`

    Shapes are equal if every dimension is known, by number or by symbol, on both sides.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph."""
        modified = False
        for node in list(model.graph):
            source = node.inputs[0] if node.inputs else None
            if source is None or node.outputs[0].is_graph_output():
                continue
            if _is_no_op(node, source):
                ir.convenience.replace_all_uses_with(node.outputs[0], source)
                model.graph.remove(node, safe=True)
                modified = True
        return ir.passes.PassResult(model, modified)


def _is_no_op(node: ir.Node, source: ir.Value) -> bool:
    if node.domain != "":
        return False
    output = node.outputs[0]
    if node.op_type == "Cast":
        return source.dtype is not None and source.dtype == node.attributes["to"].as_int()
    if node.op_type in ("Expand", "Reshape"):
        return equal_shapes(source.shape, output.shape)
    if node.op_type == "Transpose" and "perm" in node.attributes:
        perm = node.attributes["perm"].as_ints()
        return list(perm) == sorted(perm)
    return False
