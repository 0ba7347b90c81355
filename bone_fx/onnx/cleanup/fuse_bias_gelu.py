"""A bias and the gelu after it as one operator."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.fuse_skip_norms import product_bias
from bone_fx.onnx.kernels import CONTRIB

_WITH_BIAS = {"Gelu": "BiasGelu", "FastGelu": "FastGelu"}


class FuseBiasGelu(ir.passes.InPlacePass):
    """Joins the bias of a product and the gelu of the sum.

    Before: `com.microsoft::Gelu(Add(MatMul(x, w), b [N]))`
    After:  `com.microsoft::BiasGelu(MatMul(x, w), b)`; `FastGelu` takes the bias itself
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph."""
        modified = False
        for node in list(model.graph):
            if node.domain != CONTRIB or node.op_type not in _WITH_BIAS or len(node.inputs) > 1:
                continue
            total = node.inputs[0]
            bias = product_bias(total) if total is not None else None
            if total is None or bias is None:
                continue
            add = total.producer()
            assert add is not None
            product = next(v for v in add.inputs if v is not None and v is not bias)
            fused = ir.node(
                _WITH_BIAS[node.op_type], [product, bias], domain=CONTRIB, name=node.name
            )
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node, add], [fused], node.outputs, fused.outputs
            )
            modified = True
        return ir.passes.PassResult(model, modified)
