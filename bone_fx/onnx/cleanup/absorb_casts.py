"""Casts of weights, done once while they are written."""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.tensor_adapters import to_torch_dtype

from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.recipe import cast

_MAY_GROW = 1 << 19
"""Elements of a weight up to which a cast may make it larger."""


class AbsorbCasts(ir.passes.InPlacePass):
    """Moves a Cast of an initializer into its recipe.

    Before: `y = Cast(norm.weight_f16, to=FLOAT)`
    After:  `norm.weight_f32`

    Left alone: a weight that is also read in its own dtype, and a large weight that the cast would
    make larger.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the initializers that are recipes."""
        modified = False
        for value in list(model.graph.initializers.values()):
            recipe, users = recipe_of(value), [use.node for use in value.uses()]
            if recipe is None or not users or any(n.op_type != "Cast" or n.domain for n in users):
                continue
            kinds = {node.attributes["to"].as_int() for node in users}
            if (
                len(kinds) > 1
                or value.is_graph_output()
                or any(n.outputs[0].is_graph_output() for n in users)
            ):
                continue
            to = to_torch_dtype(ir.DataType(kinds.pop()))
            if to.itemsize > recipe.dtype.itemsize and math.prod(recipe.shape) > _MAY_GROW:
                continue
            set_recipe(value, cast(recipe, to))
            for node in users:
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)
