"""Rows of weights put in another order once, while they are written."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.absorb_transposes import permutation
from bone_fx.onnx.cleanup.shapes import static_shape
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.reorder import Regrouped


class AbsorbRegroups(ir.passes.InPlacePass):
    """Leaves no regrouping of an initializer's indices in the graph, and reads no initializer.

    Before: `Reshape(Transpose(Reshape(w [X, 2*I, H], [X, 2, I, H]), [0, 2, 1, 3]), [X, 2*I, H])`
    After:  `w [X, 2*I, H]`, the new order of its indices being the last step of w's recipe
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the initializers that are recipes and are read by one node."""
        modified = False
        for weight in list(model.graph.initializers.values()):
            recipe = recipe_of(weight)
            split = _only_user(weight, "Reshape")
            transpose = _only_user(split.outputs[0], "Transpose") if split else None
            reshape = _only_user(transpose.outputs[0], "Reshape") if transpose else None
            if recipe is None or split is None or transpose is None or reshape is None:
                continue
            groups = _groups(recipe.shape, split, transpose)
            end = reshape.outputs[0]
            if groups is None or static_shape(end) != recipe.shape or end.is_graph_output():
                continue
            set_recipe(weight, Regrouped(recipe, *groups))
            ir.convenience.replace_all_uses_with(end, weight)
            model.graph.remove([reshape, transpose, split], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type == op_type and not node.domain else None


def _groups(
    shape: tuple[int, ...], split: ir.Node, transpose: ir.Node
) -> tuple[int, int, int] | None:
    """The dimension that is split, and the sizes of the two parts that change places."""
    parts, perm = static_shape(split.outputs[0]), permutation(transpose)
    if parts is None or perm is None:
        return None
    moved = [axis for axis, source in enumerate(perm) if axis != source]
    if len(moved) != 2 or moved[1] != moved[0] + 1:
        return None
    dim, more = moved[0], len(parts) - len(shape)
    if more not in (1, 2) or dim >= len(shape):
        return None
    whole = parts[:dim] == shape[:dim] and parts[dim + 1 + more :] == shape[dim + 1 :]
    return (dim, parts[dim], parts[dim + 1]) if whole else None
