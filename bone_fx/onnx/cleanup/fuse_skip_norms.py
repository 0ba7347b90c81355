"""A residual addition and the layer norm after it as one operator."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.shapes import equal_shapes
from bone_fx.onnx.kernels import CONTRIB

_KERNELS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class FuseSkipNorms(ir.passes.InPlacePass):
    """Joins `Add` and `LayerNormalization`, and the bias of the product before them.

    Before: `s = Add(Add(MatMul(x, w), b), skip); y = LayerNormalization(s, gamma, beta)`
    After:  `y, _, _, s = com.microsoft::SkipLayerNormalization(MatMul(x, w), skip, gamma, beta, b)`

    s is an output of the operator only where something else reads it. All are `[B, S, N]` (or
    `[N, N']`); what broadcasts stays two operators.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the layer norms of the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "LayerNormalization" and node.domain == "":
                modified = _fuse(model.graph, node) or modified
        if modified:
            model.graph.opset_imports[CONTRIB] = 1
        return ir.passes.PassResult(model, modified)


def _fuse(graph: ir.Graph, norm: ir.Node) -> bool:
    total = norm.inputs[0]
    add = total.producer() if total is not None else None
    if total is None or add is None or not _is_addition(add) or not _is_over_last_axis(norm, total):
        return False
    left, right = add.inputs
    assert left is not None
    assert right is not None
    if total.is_graph_output() or not equal_shapes(left.shape, right.shape):
        return False
    biased = next((value for value in (left, right) if product_bias(value)), left)
    skip = right if biased is left else left
    bias = product_bias(biased)
    source = biased
    if bias is not None:
        inner = biased.producer()
        assert inner is not None
        source = next(v for v in inner.inputs if v is not None and v is not bias)
    inputs = [source, skip, *norm.inputs[1:3]]
    if bias is not None:
        inputs += [None] * (4 - len(inputs)) + [bias]
    others = len(total.uses()) > 1
    fused = ir.node(
        "SkipLayerNormalization",
        inputs,
        {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
        domain=CONTRIB,
        num_outputs=4 if others else 1,
        name=norm.name,
    )
    graph.insert_before(add, fused)
    result = norm.outputs[0]
    _replace(result, fused.outputs[0])
    if others:
        _replace(total, fused.outputs[3])
        for unused in fused.outputs[1:3]:
            unused.name = ""
    graph.remove([norm, add], safe=True)
    inner = biased.producer() if bias is not None else None
    if inner is not None:
        graph.remove(inner, safe=True)
    return True


def product_bias(value: ir.Value) -> ir.Value | None:
    """The 1-D bias, an initializer, that is added to a product for this value alone."""
    node = value.producer()
    if node is None or not _is_addition(node) or len(value.uses()) != 1 or value.is_graph_output():
        return None
    for place in (1, 0):
        bias, product = node.inputs[place], node.inputs[1 - place]
        if bias is None or not bias.is_initializer() or bias.shape is None or product is None:
            continue
        maker = product.producer()
        wide = value.shape is not None and list(bias.shape) == [value.shape[-1]]
        if maker is not None and maker.op_type in ("MatMul", "FusedMatMul") and wide:
            return bias
    return None


def _is_addition(node: ir.Node) -> bool:
    return node.op_type == "Add" and node.domain == ""


def _is_over_last_axis(norm: ir.Node, total: ir.Value) -> bool:
    if total.shape is None or total.dtype not in _KERNELS or len(total.shape) not in (2, 3):
        return False
    weights = [value for value in norm.inputs[1:] if value is not None]
    axis = norm.attributes.get_int("axis", -1)
    return (
        axis in (-1, len(total.shape) - 1)
        and all(w.is_initializer() and w.dtype == total.dtype for w in weights)
        and all(not output.uses() for output in norm.outputs[1:])
    )


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Gives `new` the place, the name and the shape of `old`."""
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    name, old.name = old.name, None
    new.name = name
