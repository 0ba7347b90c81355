"""Small constants, each stored once."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


class ShareConstants(ir.passes.InPlacePass):
    """Turns Constant nodes into initializers, one for each distinct value.

    Before: `a = Constant([-1]); b = Constant([-1]); Reshape(x, a); Reshape(y, b)`
    After:  `Reshape(x, constant_0); Reshape(y, constant_0)`, the initializer being [-1]

    Values are compared by dtype, shape and bytes. Initializers that are weights are not looked at.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replaces every Constant node of the main graph."""
        graph = model.graph
        shared: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        modified = False
        for node in list(graph):
            array = _constant(node)
            if array is None or node.outputs[0].is_graph_output():
                continue
            key = (str(array.dtype), array.shape, array.tobytes())
            if key not in shared:
                shared[key] = add_constant(graph, array)
            ir.convenience.replace_all_uses_with(node.outputs[0], shared[key])
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def add_constant(graph: ir.Graph, array: np.ndarray) -> ir.Value:
    """Adds an initializer with a name of its own, the next free `constant_N`."""
    number = sum(name.startswith("constant_") for name in graph.initializers)
    while f"constant_{number}" in graph.initializers:
        number += 1
    value = ir.Value(name=f"constant_{number}")
    tensor = ir.Tensor(array, name=value.name)
    value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
    graph.register_initializer(value)
    return value


def constant_value(value: ir.Value | None) -> np.ndarray | None:
    """The content of a small constant; None for weights and computed values."""
    if value is None or not value.is_initializer() or not isinstance(value.const_value, ir.Tensor):
        return None
    return value.const_value.numpy()


def _constant(node: ir.Node) -> np.ndarray | None:
    if node.op_type != "Constant" or node.domain != "" or len(node.attributes) != 1:
        return None
    (attribute,) = node.attributes.values()
    kinds = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    if attribute.name == "value":
        return np.array(
            attribute.as_tensor().numpy(), order="C"
        )  # not ascontiguousarray: it adds a dimension to scalars
    if attribute.name in kinds:
        return np.array(attribute.value, dtype=kinds[attribute.name])
    return None
