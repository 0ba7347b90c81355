from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from bone_fx.onnx.cleanup import CLEANUP, clean
from bone_fx.onnx.cleanup.absorb_casts import AbsorbCasts
from bone_fx.onnx.cleanup.absorb_transposes import AbsorbTransposes
from bone_fx.onnx.cleanup.forget_traces import ForgetTraces
from bone_fx.onnx.cleanup.infer_dtypes import InferDtypes
from bone_fx.onnx.cleanup.lower_cast_like import LowerCastLike
from bone_fx.onnx.cleanup.merge_reshapes import MergeReshapes, MergeTransposes, reshape_target
from bone_fx.onnx.cleanup.remove_no_ops import RemoveNoOps
from bone_fx.onnx.cleanup.share_constants import ShareConstants, constant_value
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.weights.recipes.recipe import Value
from tests.onnx.models import ops

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class Builder:
    """A graph written down node by node; the last node's outputs are the model's."""

    def __init__(self, **inputs: list[int | str]) -> None:
        self.values = {
            name: ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT))
            for name, shape in inputs.items()
        }
        self.inputs = list(self.values.values())
        self.nodes: list[ir.Node] = []
        self.weights: list[ir.Value] = []

    def weight(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Builder:
        value = ir.Value(name=name)
        set_recipe(value, Value(torch.arange(float(np.prod(shape))).reshape(shape).to(dtype)))
        self.values[name] = value
        self.weights.append(value)
        return self

    def node(
        self,
        name: str,
        op: str,
        inputs: str,
        shape: list[int | str] | None = None,
        **attributes: object,
    ) -> Builder:
        value = ir.Value(name=name, shape=ir.Shape(shape) if shape is not None else None)
        if shape is not None:
            value.type = ir.TensorType(FLOAT)
        operands = [self.values[i] for i in inputs.split()]
        self.nodes.append(ir.node(op, operands, attributes, outputs=[value], name=f"node_{name}"))
        self.values[name] = value
        return self

    def model(self, *outputs: str) -> ir.Model:
        names = outputs or (str(self.nodes[-1].outputs[0].name),)
        graph = ir.Graph(
            self.inputs,
            [self.values[name] for name in names],
            nodes=self.nodes,
            initializers=self.weights,
            opset_imports={"": 18},
        )
        return ir.Model(graph, ir_version=10)


def once_and_again(step: ir.passes.InPlacePass, model: ir.Model) -> ir.Model:
    """Runs a pass, which must change the model, and then must not."""
    assert step(model).modified
    assert not step(model).modified
    return model


def test_a_transposed_weight_is_stored_transposed() -> None:
    build = Builder(x=["n", 3]).weight("w", 4, 3).node("t", "Transpose", "w", perm=[1, 0])
    model = once_and_again(AbsorbTransposes(), build.node("y", "MatMul", "x t").model())
    weight = model.graph.initializers["w"]
    assert ops(model) == ["MatMul"]
    assert list(weight.shape or []) == [3, 4]
    assert recipe_of(weight).evaluate()[2, 1] == 5.0  # type: ignore[union-attr]


def test_a_transposed_transpose_is_the_weight_itself() -> None:
    build = Builder(x=["n", 4]).weight("w", 4, 3).node("t", "Transpose", "w", perm=[1, 0])
    build.node("u", "Transpose", "t", perm=[1, 0]).node("y", "MatMul", "x u")
    model = build.model()
    recipe = recipe_of(model.graph.initializers["w"])
    AbsorbTransposes()(model)
    AbsorbTransposes()(model)
    assert recipe_of(model.graph.initializers["w"]) is recipe


def test_a_weight_read_both_ways_is_stored_once() -> None:
    build = Builder(x=["n", 3]).weight("w", 4, 3).node("t", "Transpose", "w", perm=[1, 0])
    model = build.node("z", "Gather", "w x").node("y", "MatMul", "x t").model("y", "z")
    once_and_again(AbsorbTransposes(), model)
    assert sorted(ops(model)) == ["FusedMatMul", "Gather"]
    assert model.opset_imports["com.microsoft"] == 1
    assert list(model.graph.initializers) == ["w"]


def test_only_without_a_product_is_it_stored_twice() -> None:
    build = Builder(x=["n", 3]).weight("w", 3, 3).node("t", "Transpose", "w", perm=[1, 0])
    model = build.node("s", "Sin", "t").node("y", "Mul", "s w").model()
    once_and_again(AbsorbTransposes(), model)
    assert list(model.graph.initializers) == ["w", "w.transposed"]


def test_a_permuted_weight_keeps_its_order_of_dimensions() -> None:
    build = Builder(x=["n", 2]).weight("w", 2, 3, 4).node("t", "Transpose", "w", perm=[2, 0, 1])
    model = once_and_again(AbsorbTransposes(), build.node("y", "MatMul", "t x").model())
    assert list(model.graph.initializers["w"].shape or []) == [4, 2, 3]


def test_a_cast_weight_is_stored_cast() -> None:
    build = Builder(x=["n", 3]).weight("w", 3, dtype=torch.float16)
    model = build.node("c", "Cast", "w", to=FLOAT).node("y", "Mul", "x c").model()
    once_and_again(AbsorbCasts(), model)
    assert model.graph.initializers["w"].dtype == FLOAT


@pytest.mark.parametrize("why", ["read in its own dtype", "large"])
def test_a_cast_that_costs_space_stays(why: str) -> None:
    shape = (3,) if why != "large" else (1024, 1024)
    build = Builder(x=["n", shape[-1]]).weight("w", *shape, dtype=torch.float16)
    build.node("c", "Cast", "w", to=FLOAT)
    if why != "large":
        build.node("own", "Sin", "w")
    model = build.node("y", "Mul", "x c").model(*(["y"] if why == "large" else ["y", "own"]))
    assert not AbsorbCasts()(model).modified


def test_reshapes_get_constant_targets() -> None:
    build = Builder(x=["b", "s", 576]).node("n", "Shape", "x")
    model = build.node("y", "Reshape", "x n", ["b", "s", 9, 64], allowzero=1).model()
    once_and_again(MergeReshapes(), model)
    (node,) = (n for n in model.graph if n.op_type == "Reshape")
    assert constant_value(node.inputs[1]).tolist() == [0, 0, 9, 64]  # type: ignore[union-attr]
    assert "allowzero" not in node.attributes


@pytest.mark.parametrize(
    ("source", "result", "target"),
    [
        (["b", "s", 576], ["b", "s", 9, 64], [0, 0, 9, 64]),
        (["b", "s", 9, 64], ["b", "s", 576], [0, 0, 576]),
        (["b", "s", 4], ["b*s", 4], [-1, 4]),
        (["b", "s", 4], ["s", "b", 4], None),
        (["b", None], ["b", None], None),
        (["b", 0], ["b", 0, 4], None),
    ],
)
def test_targets(source: list[object], result: list[object], target: list[int] | None) -> None:
    assert reshape_target(ir.Shape(source), ir.Shape(result)) == target  # type: ignore[arg-type]


def test_reshapes_that_cancel_go() -> None:
    build = Builder(x=["b", "s", 576]).node("n", "Shape", "x")
    build.node("a", "Reshape", "x n", ["b", "s", 9, 64]).node(
        "c", "Reshape", "a n", ["b", "s", 576]
    )
    model = build.node("y", "Sin", "c", ["b", "s", 576]).model()
    once_and_again(MergeReshapes(), model)
    assert model.graph.outputs[0].producer().inputs[0].name == "x"  # type: ignore[union-attr]


def test_transposes_that_cancel_go_and_others_compose() -> None:
    build = Builder(x=["b", "s", 9, 64]).node("a", "Transpose", "x", perm=[0, 2, 1, 3])
    model = build.node("c", "Transpose", "a", perm=[0, 2, 1, 3]).node("y", "Sin", "c").model()
    once_and_again(MergeTransposes(), model)
    assert "Transpose" not in ops(model)
    build = Builder(x=["b", "s", 9, 64]).node("a", "Transpose", "x", perm=[0, 2, 1, 3])
    model = build.node("y", "Transpose", "a", perm=[0, 1, 3, 2]).model()
    once_and_again(MergeTransposes(), model)
    assert model.graph.outputs[0].producer().attributes["perm"].as_ints() == (0, 2, 3, 1)  # type: ignore[union-attr]


def test_nodes_that_change_nothing_go() -> None:
    build = Builder(x=["b", 4]).node("n", "Shape", "x").node("e", "Expand", "x n", ["b", 4])
    build.node("c", "Cast", "e", ["b", 4], to=FLOAT).node("t", "Transpose", "c", perm=[0, 1])
    model = once_and_again(RemoveNoOps(), build.node("y", "Sin", "t").model())
    assert ops(model) == ["Shape", "Sin"]


def test_an_expansion_of_unknown_size_stays() -> None:
    build = Builder(x=["b", 4]).node("n", "Shape", "x").node("e", "Expand", "x n", ["c", 4])
    assert not RemoveNoOps()(build.node("y", "Sin", "e").model()).modified


def test_equal_constants_are_one() -> None:
    build = Builder(x=["b", 4]).node("one", "Constant", "", value_float=1.0)
    build.node("uno", "Constant", "", value=ir.tensor(np.float32(1.0)))
    build.node("ones", "Constant", "", value_floats=[1.0])
    build.node("a", "Add", "x one").node("c", "Add", "a uno").node("y", "Add", "c ones")
    model = once_and_again(ShareConstants(), build.model())
    assert [list(v.shape or []) for v in model.graph.initializers.values()] == [[], [1]]


def test_cast_like_becomes_cast_or_constant() -> None:
    build = Builder(x=["b", 4]).node("h", "Cast", "x", to=HALF)
    build.node("one", "Constant", "", value_float=1.0).node("c", "CastLike", "one h")
    build.node("d", "CastLike", "x h").node("e", "Add", "d c").node("y", "Add", "e h")
    model = build.model()
    ShareConstants()(model)
    once_and_again(InferDtypes(), model)
    once_and_again(LowerCastLike(), model)
    assert ops(model) == ["Cast", "Cast", "Add", "Add"]
    assert {v.dtype for v in model.graph.initializers.values()} == {FLOAT, HALF}


def test_traces_are_forgotten() -> None:
    model = Builder(x=["b", 4]).node("a", "Sin", "x", ["b", 4]).node("y", "Sin", "a").model()
    node = next(iter(model.graph))
    node.metadata_props["stack_trace"], node.doc_string = "line 1", "text"
    once_and_again(ForgetTraces(), model)
    assert not node.metadata_props
    assert not node.doc_string
    assert node.outputs[0].shape is None


def test_the_whole_table_runs_twice() -> None:
    build = Builder(x=["n", 3]).weight("w", 4, 3).node("t", "Transpose", "w", perm=[1, 0])
    model = build.node("y", "MatMul", "x t", ["n", 4]).model()
    assert clean(model)
    assert not clean(model)
    assert len({step.__name__ for step in CLEANUP}) == len(CLEANUP) - 1  # one pass runs twice
