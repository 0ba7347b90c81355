"""CastLike, which has no kernel anywhere, as the Cast or the constant that it stands for."""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.cleanup.share_constants import add_constant, constant_value


class LowerCastLike(ir.passes.InPlacePass):
    """Lowers CastLike and evaluates casts of small constants.

    Before: `s = CastLike(constant_f32, x_f16)`, `y = CastLike(v, x_f16)`
    After:  `s = constant_f16`,                  `y = Cast(v, to=FLOAT16)`
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph."""
        graph, modified = model.graph, False
        constants: dict[tuple[int, ir.DataType], ir.Value] = {}
        for node in list(graph):
            to = _target(node)
            if to is None:
                continue
            source, output = node.inputs[0], node.outputs[0]
            array = constant_value(source)
            if array is not None and array.nbytes <= 1024 and not output.is_graph_output():
                key = (id(source), to)
                if key not in constants:
                    constants[key] = add_constant(graph, array.astype(to.numpy()))
                ir.convenience.replace_all_uses_with(output, constants[key])
                graph.remove(node, safe=True)
            elif node.op_type == "CastLike":
                replacement = ir.node("Cast", [source], {"to": to}, name=node.name)
                ir.convenience.replace_nodes_and_values(
                    graph, node, [node], [replacement], [output], replacement.outputs
                )
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified)


def _target(node: ir.Node) -> ir.DataType | None:
    if node.domain != "" or node.op_type not in ("Cast", "CastLike"):
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    like = node.inputs[1]
    return like.dtype if like is not None else None
