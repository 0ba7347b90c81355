"""Reshapes whose target shape need not be computed at run time."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bone_fx.onnx.cleanup.shapes import reshape_target
from bone_fx.onnx.cleanup.share_constants import add_constant, constant_value


class ConstantReshapes(ir.passes.InPlacePass):
    """Gives a Reshape a constant target where zeros (copy) and one -1 can say it.

    Before: `Reshape(x [batch, seq, 576], Concat(batch, seq, [9], [64]), allowzero=1)`
    After:  `Reshape(x [batch, seq, 576], [0, 0, 9, 64])`

    What computed the shape is left without users.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph."""
        modified = False
        shared: dict[tuple[int, ...], ir.Value] = {}
        for node in model.graph:
            if (
                node.op_type != "Reshape"
                or node.domain != ""
                or constant_value(node.inputs[1]) is not None
            ):
                continue
            source = node.inputs[0]
            target = reshape_target(
                source.shape if source is not None else None, node.outputs[0].shape
            )
            if target is not None:
                set_reshape_target(node, target, shared)
                modified = True
        return ir.passes.PassResult(model, modified)


def set_reshape_target(
    node: ir.Node, target: list[int], shared: dict[tuple[int, ...], ir.Value]
) -> None:
    """Makes `target` (of allowzero=0) the second input; `shared` keeps one constant a value."""
    assert isinstance(node.graph, ir.Graph)
    key = tuple(target)
    if key not in shared:
        shared[key] = add_constant(node.graph, np.array(target, dtype=np.int64))
    node.replace_input_with(1, shared[key])
    node.attributes.pop("allowzero", None)
