"""Rows of weights put part by part, once while they are written."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.shapes import static_shape
from bone_fx.onnx.packed_names import by_part_name
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.reorder import Ungroup


class AbsorbGroups(ir.passes.InPlacePass):
    """Leaves no regrouping of a weight's rows in the graph, and reads no initializer.

    Before: `a, b, … = Split(Reshape(w [G * P, …], [G, P, …]), axis=1)`,
            `Concat(Reshape(a, [-1, …]), Reshape(b, [-1, …]), …, axis=0)`
    After:  `w.by_part_G_…`, the new order being the last step of its recipe
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the concatenations of the main graph."""
        graph = model.graph
        modified = False
        for node in list(graph):
            grouped = None if node.outputs[0].is_graph_output() else _grouped(node)
            if grouped is None:
                continue
            weight, groups, widths = grouped
            recipe = recipe_of(weight)
            assert recipe is not None
            name = by_part_name(weight.name or "", groups, widths)
            if name not in graph.initializers:
                value = ir.Value(name=name)
                set_recipe(value, Ungroup(recipe, groups, widths))
                graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
            graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def _grouped(node: ir.Node) -> tuple[ir.Value, int, tuple[int, ...]] | None:
    """Weight, groups and widths behind a concatenation of its parts; None if it is another one."""
    if node.op_type != "Concat" or node.domain or node.attributes.get_int("axis", 1) != 0:
        return None
    parts = [_reshaped(value) for value in node.inputs]
    split = parts[0].producer() if parts[0] is not None else None
    if split is None or split.op_type != "Split" or split.attributes.get_int("axis", 0) != 1:
        return None
    weight = _reshaped(split.inputs[0])
    recipe = recipe_of(weight)
    shapes = [
        static_shape(split.inputs[0]),
        *map(static_shape, split.outputs),
        *map(static_shape, node.inputs),
    ]
    if weight is None or recipe is None or tuple(parts) != tuple(split.outputs) or None in shapes:
        return None
    (groups, period, *rest), *others = (shape for shape in shapes if shape is not None)
    cut, rows = others[: len(parts)], others[len(parts) :]
    widths = tuple(shape[1] for shape in cut)
    as_expected = (
        recipe.shape == (groups * period, *rest)
        and sum(widths) == period
        and rows == [(groups * width, *rest) for width in widths]
    )
    return (weight, groups, widths) if as_expected else None


def _reshaped(value: ir.Value | None) -> ir.Value | None:
    node = value.producer() if value is not None else None
    return node.inputs[0] if node is not None and node.op_type == "Reshape" else None
