"""Transposes of weights, done once while they are written."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.kernels import CONTRIB
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.recipe import Recipe, Transpose


class AbsorbTransposes(ir.passes.InPlacePass):
    """Leaves no Transpose of an initializer in the graph, and reads no initializer.

    Before: `MatMul(x, Transpose(w [O, I]))`
    After:  `MatMul(x, w [I, O])`, the transpose being the last step of w's recipe

    Before: `Gather(w [V, H], ids)`, `MatMul(x, Transpose(w))` (a head tied to the embedding)
    After:  `Gather(w [V, H], ids)`, `com.microsoft::FusedMatMul(x, w, transB=1)`: w is stored once

    Only where a weight is read in both orientations by something else than a product is it stored
    twice, the second time as `<name>.transposed`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the initializers that are recipes."""
        modified = False
        waiting = list(model.graph.initializers.values())
        while waiting:
            weight = waiting.pop()
            recipe = recipe_of(weight)
            transposes = [use.node for use in weight.uses() if _is_absorbable(use.node)]
            if recipe is None or not transposes:
                continue
            permutations = {tuple(permutation(node) or ()) for node in transposes}
            alone = len(transposes) == len(weight.uses()) and not weight.is_graph_output()
            if alone and len(permutations) == 1:
                set_recipe(weight, _transposed(recipe, permutations.pop()))
                for node in transposes:
                    _replace(node, weight)
                waiting.append(weight)  # what read the transpose may be another one
            else:
                for node in transposes:
                    waiting += _absorb_beside_others(model, weight, node, recipe)
            modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Checks that no Transpose of a recipe is left."""
        weights = [node.inputs[0] for node in model.graph if _is_absorbable(node)]
        left = [value.name for value in weights if value is not None and recipe_of(value)]
        if left:
            raise ir.passes.PostconditionError(f"weights are still transposed in the graph: {left}")


def permutation(node: ir.Node) -> list[int] | None:
    """The permutation of a Transpose that states it; None for any other node."""
    if node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return None
    return list(node.attributes["perm"].as_ints())


def _absorb_beside_others(
    model: ir.Model, weight: ir.Value, node: ir.Node, recipe: Recipe
) -> list[ir.Value]:
    """Absorbs one transpose of a weight that is read otherwise too; returns the copy, if any."""
    perm = tuple(permutation(node) or ())
    users = list(node.outputs[0].uses())
    products = [use.node for use in users if use.node.op_type == "MatMul" and use.idx == 1]
    if perm == (1, 0) and len(products) == len(users) and not node.outputs[0].is_graph_output():
        for product in products:
            fused = ir.node(
                "FusedMatMul",
                [product.inputs[0], weight],
                {"transB": 1},
                domain=CONTRIB,
                name=product.name,
            )
            ir.convenience.replace_nodes_and_values(
                model.graph, product, [product], [fused], product.outputs, fused.outputs
            )
        model.graph.remove(node, safe=True)
        model.graph.opset_imports[CONTRIB] = 1
        return []
    suffix = "" if perm == (1, 0) else "_" + "_".join(map(str, perm))
    name = f"{weight.name}.transposed{suffix}"
    if name not in model.graph.initializers:
        copy = ir.Value(name=name)
        set_recipe(copy, _transposed(recipe, perm))
        model.graph.register_initializer(copy)
    _replace(node, model.graph.initializers[name])
    return [model.graph.initializers[name]]


def _is_absorbable(node: ir.Node) -> bool:
    """Whether the node is a Transpose that is no output of the model, which keeps its name."""
    return permutation(node) is not None and not node.outputs[0].is_graph_output()


def _replace(node: ir.Node, value: ir.Value) -> None:
    assert node.graph is not None
    ir.convenience.replace_all_uses_with(node.outputs[0], value)
    node.graph.remove(node, safe=True)


def _transposed(recipe: Recipe, perm: tuple[int, ...]) -> Recipe:
    """The permuted recipe; two steps that undo each other are none."""
    if isinstance(recipe, Transpose):
        composed = tuple(recipe.permutation[axis] for axis in perm)
        if composed == tuple(range(len(composed))):
            return recipe.recipe
    return Transpose(recipe, perm)
