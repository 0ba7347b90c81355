"""Concatenations of weights, done once while they are written."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.packed_names import packed_name
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.recipe import Concat


class AbsorbConcats(ir.passes.InPlacePass):
    """Leaves no Concat of initializers in the graph, and reads no initializer.

    Before: `MatMul(x, Transpose(Concat(w_q, w_k, w_v, axis=0)))`
    After:  `MatMul(x, Transpose(w_qkv))`, the concatenation being the last step of w_qkv's recipe
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the concatenations of the main graph."""
        graph = model.graph
        modified = False
        for node in list(graph):
            if node.op_type != "Concat" or node.domain or node.outputs[0].is_graph_output():
                continue
            recipes = [recipe_of(value) for value in node.inputs]
            names = [value.name or "" for value in node.inputs if value is not None]
            name = packed_name(names)
            axis = node.attributes.get_int("axis", 0)
            if None in recipes or len(set(names)) < len(names) or name in graph.initializers:
                continue
            packed = ir.Value(name=name)
            parts = tuple(recipe for recipe in recipes if recipe is not None)
            set_recipe(packed, Concat(parts, axis % len(parts[0].shape)))
            graph.register_initializer(packed)
            ir.convenience.replace_all_uses_with(node.outputs[0], packed)
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
