"""Dtypes of values that the translation left without one."""

from __future__ import annotations

import functools
from collections.abc import Callable

import onnx
import onnx_ir as ir

_BY_NAME = {f"tensor({kind.name.lower()})": kind for kind in ir.DataType}


class InferDtypes(ir.passes.InPlacePass):
    """Fills in dtypes from the operators' schemas; what is known is not touched.

    Before: `val_3 = MatMul(x: FLOAT16, w: FLOAT16)`
    After:  `val_3: FLOAT16 = MatMul(x: FLOAT16, w: FLOAT16)`
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Visits the main graph in order."""
        modified = False
        for node in model.graph:
            for index, output in enumerate(node.outputs):
                if output.dtype is None and (dtype := inferred_dtype(node, index)) is not None:
                    output.dtype = dtype
                    modified = True
        return ir.passes.PassResult(model, modified)


def inferred_dtype(
    node: ir.Node,
    index: int,
    known: Callable[[ir.Value], ir.DataType | None] = lambda value: value.dtype,
) -> ir.DataType | None:
    """The dtype of an output as the operator's schema gives it; None if it does not say.

    Args:
        node: A node of the default domain; others have no schema here.
        index: Place of the output.
        known: Dtype of an input.
    """
    if node.domain != "":
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type == "ConstantOfShape":
        fill = node.attributes.get("value")
        return fill.as_tensor().dtype if fill is not None else ir.DataType.FLOAT
    schema = _schema(node.op_type)
    if schema is None or not schema.outputs:
        return None
    letter = schema.outputs[min(index, len(schema.outputs) - 1)].type_str
    for place, value in enumerate(node.inputs):
        formal = schema.inputs[min(place, len(schema.inputs) - 1)]
        if formal.type_str != letter or value is None:
            continue
        if (dtype := known(value)) is not None:
            return dtype
    allowed = next(
        (c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == letter),
        [letter],
    )
    return _BY_NAME.get(allowed[0]) if len(allowed) == 1 else None


@functools.cache
def _schema(op_type: str) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, 18, "")
    except onnx.defs.SchemaError:
        return None
