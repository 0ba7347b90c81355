"""Reshapes with targets that need not be computed, and chains of them as one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import transpose_transpose_rule

from bone_fx.onnx.cleanup.shapes import equal_shapes
from bone_fx.onnx.cleanup.share_constants import add_constant, constant_value

_Targets = dict[tuple[int, ...], ir.Value]


class MergeTransposes(RewritePass):
    """onnxscript's rule for a transpose of a transpose: one, or Identity."""

    def __init__(self) -> None:
        super().__init__([transpose_transpose_rule])


class MergeReshapes(ir.passes.InPlacePass):
    """Gives a Reshape a constant target, and reads through one whose result is reshaped again.

    Before: `b = Reshape(a [n, s, 576], Concat(n, s, [9], [64]), allowzero=1)`
    After:  `b = Reshape(a, [0, 0, 9, 64])`; what computed the shape is left without users

    Before: `c = Reshape(b, [0, 0, 576])`
    After:  `c = a`; where the shapes differ, `c = Reshape(a, ...)` with a constant target

    Only where zeros (copy) and one -1 can say the target. The inner one of a chain may be an
    Unsqueeze, Squeeze or Flatten as well.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph in order, so that long chains collapse in one visit."""
        modified = False
        for change in (_make_target_constant, _read_through):
            targets: _Targets = {}
            for node in list(model.graph):
                modified = (_is_reshape(node) and change(node, targets)) or modified
        return ir.passes.PassResult(model, modified)


def reshape_target(source: ir.Shape | None, result: ir.Shape | None) -> list[int] | None:
    """The constant target of a `Reshape` (allowzero=0) from `source` to `result`, if any.

    Numbers stand for themselves, 0 copies the dimension in the same place, and at most one -1 is
    what is left over.
    """
    if source is None or result is None or source.has_unknown_dim() or result.has_unknown_dim():
        return None
    target: list[int] = []
    for place, dim in enumerate(result):
        if isinstance(dim, int):
            target.append(dim)
        else:
            target.append(0 if place < len(source) and source[place] == dim else -1)
    return None if target.count(-1) > 1 or 0 in result.dims else target


def _is_reshape(node: ir.Node) -> bool:
    return node.domain == "" and node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def _make_target_constant(node: ir.Node, targets: _Targets) -> bool:
    if node.op_type != "Reshape" or constant_value(node.inputs[1]) is not None:
        return False
    return _reshape(node, node.inputs[0], targets)


def _read_through(node: ir.Node, targets: _Targets) -> bool:
    inner = node.inputs[0].producer() if node.inputs[0] is not None else None
    if inner is None or not _is_reshape(inner) or inner.inputs[0] is None:
        return False
    source, output = inner.inputs[0], node.outputs[0]
    if equal_shapes(source.shape, output.shape) and not output.is_graph_output():
        assert node.graph is not None
        ir.convenience.replace_all_uses_with(output, source)
        node.graph.remove(node, safe=True)
        return True
    return node.op_type == "Reshape" and _reshape(node, source, targets)


def _reshape(node: ir.Node, source: ir.Value | None, targets: _Targets) -> bool:
    """Makes a node read a source with a constant target; `targets` keeps one constant a value."""
    target = reshape_target(source.shape if source is not None else None, node.outputs[0].shape)
    if target is None:
        return False
    assert isinstance(node.graph, ir.Graph)
    key = tuple(target)
    if key not in targets:
        targets[key] = add_constant(node.graph, np.array(target, dtype=np.int64))
    node.replace_input_with(0, source)
    node.replace_input_with(1, targets[key])
    node.attributes.pop("allowzero", None)
    return True
