"""Sequences of parts become one Split."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from bone_fx.onnx.cleanup.lower_split_sequences import LowerSplitSequences
from bone_fx.onnx.cleanup.share_constants import add_constant


def model_of(split: Any, numbers: list[int]) -> ir.Model:
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", 10]))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 18}, name="parts")
    sizes = add_constant(graph, np.array(split, dtype=np.int64))
    sequence = ir.node("SplitToSequence", [x, sizes], {"axis": 1})
    graph.append(sequence)
    for place, number in enumerate(numbers):
        at = add_constant(graph, np.array(number, dtype=np.int64))
        taken = ir.node("SequenceAt", [sequence.outputs[0], at])
        used = ir.node("Neg", [taken.outputs[0]])
        used.outputs[0].name = f"y{place}"
        used.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.extend([taken, used])
        graph.outputs.append(used.outputs[0])
    return ir.Model(graph, ir_version=10)


def run(model: ir.Model) -> list[np.ndarray[Any, Any]]:
    content = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    x = np.arange(20, dtype=np.float32).reshape(2, 10)
    return [np.asarray(value) for value in session.run(None, {"x": x})]


@pytest.mark.parametrize(
    ("split", "numbers"), [(4, [0, 2]), (5, [1, 0]), ([3, 7], [1]), ([1, 2, 7], [-1, 0, 1])]
)
def test_parts_are_the_same(split: Any, numbers: list[int]) -> None:
    model = model_of(split, numbers)
    expected = run(model)
    assert LowerSplitSequences()(model).modified
    assert {node.op_type for node in model.graph} == {"Split", "Neg"}
    for found, wanted in zip(run(model), expected, strict=True):
        assert np.array_equal(found, wanted)
    assert not LowerSplitSequences()(model).modified


def test_sequence_that_is_used_otherwise_stays() -> None:
    model = model_of(5, [0])
    sequence = next(node for node in model.graph if node.op_type == "SplitToSequence")
    length = ir.node("SequenceLength", [sequence.outputs[0]])
    model.graph.append(length)
    assert not LowerSplitSequences()(model).modified
