"""Chains of reshapes as one."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.constant_reshapes import set_reshape_target
from bone_fx.onnx.cleanup.shapes import equal_shapes, reshape_target


class MergeReshapes(ir.passes.InPlacePass):
    """Reads through a reshape whose result is reshaped again.

    Before: `b = Reshape(a [n, s, 576], [0, 0, 9, 64]); c = Reshape(b, [0, 0, 576])`
    After:  `c = a`; where the shapes differ, `c = Reshape(a, ...)` with a constant target

    The inner one may be an Unsqueeze, Squeeze or Flatten as well.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph in order, so that long chains collapse in one visit."""
        modified = False
        shared: dict[tuple[int, ...], ir.Value] = {}
        for node in list(model.graph):
            if not _is_reshape(node):
                continue
            inner = node.inputs[0].producer() if node.inputs[0] is not None else None
            if inner is None or not _is_reshape(inner) or inner.inputs[0] is None:
                continue
            source, output = inner.inputs[0], node.outputs[0]
            if equal_shapes(source.shape, output.shape) and not output.is_graph_output():
                ir.convenience.replace_all_uses_with(output, source)
                model.graph.remove(node, safe=True)
            elif (
                node.op_type == "Reshape"
                and (target := reshape_target(source.shape, output.shape)) is not None
            ):
                node.replace_input_with(0, source)
                set_reshape_target(node, target, shared)
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified)


def _is_reshape(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
