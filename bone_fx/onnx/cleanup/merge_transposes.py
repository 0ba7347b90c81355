"""Pairs of transposes as one, or none."""

from __future__ import annotations

import onnx_ir as ir


class MergeTransposes(ir.passes.InPlacePass):
    """Composes a transpose of a transpose.

    Before: `b = Transpose(a, [0, 2, 1, 3]); c = Transpose(b, [0, 2, 1, 3])`
    After:  `c = a`

    Where the two do not cancel and b has no other user: `c = Transpose(a, composed)`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph in order, so that long chains collapse in one visit."""
        modified = False
        for node in list(model.graph):
            outer = permutation(node)
            inner_node = node.inputs[0].producer() if outer and node.inputs[0] is not None else None
            inner = permutation(inner_node) if inner_node is not None else None
            if outer is None or inner is None or inner_node is None:
                continue
            source, output = inner_node.inputs[0], node.outputs[0]
            assert source is not None
            composed = [inner[axis] for axis in outer]
            if composed == sorted(composed) and not output.is_graph_output():
                ir.convenience.replace_all_uses_with(output, source)
                model.graph.remove(node, safe=True)
            elif (
                len(inner_node.outputs[0].uses()) == 1
                and not inner_node.outputs[0].is_graph_output()
            ):
                node.replace_input_with(0, source)
                node.attributes["perm"] = ir.AttrInt64s("perm", composed)
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified)


def permutation(node: ir.Node) -> list[int] | None:
    """The permutation of a Transpose that states it; None for any other node."""
    if node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return None
    return list(node.attributes["perm"].as_ints())
