"""What a model must not carry: where and how it was traced."""

from __future__ import annotations

import onnx_ir as ir


class ForgetTraces(ir.passes.InPlacePass):
    """Drops metadata, doc strings and shapes of inner values; names nodes after their first output.

    Before: node `node_MatMul_7` with a stack trace, inner value `linear_3 [s43 + 1, 32]`
    After:  node `linear_3` without metadata, inner value `linear_3` whose shape ONNX Runtime infers

    Inner shapes of a trace hold only under the trace's own guards, and ONNX Runtime infers them
    again anyway.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the model, its graph, nodes and values."""
        graph = model.graph
        modified = _forget(model) | _forget(graph)
        for value in (*graph.initializers.values(), *graph.inputs, *graph.outputs):
            modified |= _forget(value)
        for node in graph:
            modified |= _forget(node)
            if node.name != node.outputs[0].name:
                node.name = node.outputs[0].name
                modified = True
            for output in node.outputs:
                modified |= _forget(output)
                if output.shape is not None and not output.is_graph_output():
                    output.shape, output.type = None, None
                    modified = True
        return ir.passes.PassResult(model, modified)


def _forget(thing: ir.Model | ir.Graph | ir.Node | ir.Value) -> bool:
    carried = bool(thing.metadata_props) or bool(thing.doc_string)
    thing.metadata_props.clear()
    thing.doc_string = None
    return carried
