"""Products with constant weights become MatMulNBits, gathered ones GatherBlockQuantized."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from bone_fx.onnx.quantize import Quantization, QuantizeWeights, head_of
from bone_fx.onnx.recipe_tensor import recipe_of, set_recipe
from bone_fx.onnx.writer import write_model
from bone_fx.weights.recipes.nbits import Scheme, quantize
from bone_fx.weights.recipes.quantized import Part
from bone_fx.weights.recipes.recipe import Cast, Concat, Recipe, Transpose, Value
from bone_fx.weights.recipes.reorder import Regrouped
from bone_fx.weights.recipes.second_moments import SecondMoments

V, H, F = 96, 64, 32
INT4, INT8 = Scheme(4, 16), Scheme(8, 16)
KEEP = Quantization(INT4, None, follow_head=False)


def constant(name: str, *shape: int) -> ir.Value:
    generator = torch.Generator().manual_seed(len(name))
    value = ir.Value(name=name)
    set_recipe(value, Value(torch.randn(*shape, generator=generator)))
    return value


def tied_model(middle: int = F) -> ir.Model:
    """ids -> embedding -> MatMul -> Gemm -> head tied to the embedding."""
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
    table, up, down = (
        constant("table", V, H),
        constant("up", H, middle),
        constant("down", H, middle),
    )
    bias = constant("bias_of_down", H)
    embed = ir.node("Gather", [table, ids])
    first = ir.node("MatMul", [embed.outputs[0], up])
    second = ir.node("Gemm", [first.outputs[0], down, bias], {"transB": 1})
    head = ir.node("FusedMatMul", [second.outputs[0], table], {"transB": 1}, domain="com.microsoft")
    logits = head.outputs[0]
    logits.name, logits.type = "logits", ir.TensorType(ir.DataType.FLOAT)
    logits.shape = ir.Shape(["n", V])
    graph = ir.Graph(
        [ids],
        [logits],
        nodes=[embed, first, second, head],
        initializers=[table, up, down, bias],
        opset_imports={"": 18, "com.microsoft": 1},
        name="tied",
    )
    return ir.Model(graph, ir_version=10)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def rounded(
    model: ir.Model, name: str, scheme: Scheme, *, transposed: bool = False
) -> torch.Tensor:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    weight = torch.from_numpy(tensor.numpy().copy())
    values = quantize(weight.t().contiguous() if transposed else weight, scheme).values()
    return values.t() if transposed else values


def run(model: ir.Model, folder: Path) -> torch.Tensor:
    write_model(model, folder)
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {"ids": np.array([3, 0, 95])})[0])


@pytest.mark.parametrize(
    ("plan", "head", "table"),
    [
        (Quantization(INT4, INT8), INT8, INT8),
        (Quantization(Scheme(4, 32, True), Scheme(4, 32, True)), *[Scheme(4, 32, True)] * 2),
        (Quantization(INT4, INT8, follow_head=False), INT8, None),
        (Quantization(INT4, INT8, INT4, follow_head=False), INT8, INT4),
        (KEEP, None, None),
    ],
)
def test_graph_computes_with_the_rounded_weights(
    plan: Quantization, head: Scheme | None, table: Scheme | None, tmp_path: Path
) -> None:
    model = tied_model()
    raw = torch.from_numpy(model.graph.initializers["table"].const_value.numpy().copy())  # type: ignore[union-attr]
    bias = torch.from_numpy(model.graph.initializers["bias_of_down"].const_value.numpy().copy())  # type: ignore[union-attr]
    embedding = raw if table is None else rounded(model, "table", table)
    hidden = embedding[[3, 0, 95]] @ rounded(model, "up", plan.weights, transposed=True)
    hidden = hidden @ rounded(model, "down", plan.weights).t() + bias
    expected = hidden @ (raw if head is None else rounded(model, "table", head)).t()
    QuantizeWeights(plan)(model)
    found = run(model, tmp_path)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_tied_weight_is_stored_once() -> None:
    model = tied_model()
    QuantizeWeights(Quantization(INT4, INT8))(model)
    assert operators(model) == [
        "Reshape",
        "GatherBlockQuantized",
        "MatMulNBits",
        "MatMulNBits",
        "Add",
        "MatMulNBits",
    ]
    assert [n for n in model.graph.initializers if n.endswith("codes")] == [
        "up.codes",
        "down.codes",
        "table.codes",
    ]
    assert "table" not in model.graph.initializers


def test_second_run_changes_nothing() -> None:
    model = tied_model()
    plan = Quantization(INT4, INT8)
    assert QuantizeWeights(plan)(model).modified
    assert not QuantizeWeights(plan)(model).modified


def test_weight_that_is_no_multiple_of_the_block_size_stays() -> None:
    model = tied_model(middle=40)
    step = QuantizeWeights(KEEP)
    step(model)
    assert operators(model) == ["Gather", "MatMulNBits", "Gemm", "FusedMatMul"]
    assert list(step.done.kept) == ["down"]
    assert "40" in step.done.kept["down"]


def test_head_is_the_one_product_before_the_logits() -> None:
    model = tied_model()
    head = head_of(model.graph)
    assert head is not None
    assert head.op_type == "FusedMatMul"
    model.graph.outputs[0].name = "hidden"
    assert head_of(model.graph) is None


def squares_of(recipe: Recipe, known: Recipe, scheme: Scheme = INT4) -> torch.Tensor | None:
    """What the product with a weight of two packed ones, `[F, H]`, counts its inputs by."""
    model = tied_model()
    weight = model.graph.initializers["down"]
    set_recipe(weight, recipe)
    moments = {id(known): SecondMoments(torch.arange(1.0, F + 1), torch.zeros(F, 0))}
    QuantizeWeights(Quantization(scheme, None, follow_head=False), moments)(model)
    part = recipe_of(model.graph.initializers["down.codes"])
    assert isinstance(part, Part)
    return None if part.weight.moments is None else part.weight.moments.squares


def test_moments_are_found_behind_what_keeps_the_inputs() -> None:
    first, second = Value(torch.randn(H // 2, F).double()), Value(torch.randn(H // 2, F).double())
    packed = Cast(Concat((first, second)), torch.float32)
    turned = Transpose(Concat((Transpose(first), Transpose(second)), 1))
    by_part = Regrouped(packed, 0, 2, 2)
    for recipe in (packed, Cast(turned, torch.float32), by_part):
        assert torch.equal(squares_of(recipe, second), torch.arange(1.0, F + 1))  # type: ignore[arg-type]
    assert squares_of(packed, first, INT8) is None


def test_moments_are_left_out_where_inputs_are_in_another_order() -> None:
    weight = Value(torch.randn(H, F))
    assert squares_of(Regrouped(weight, 1, 2, 2), weight) is None
    half = Value(torch.randn(H, F // 2))
    assert squares_of(Concat((half, Value(torch.randn(H, F // 2))), 1), half) is None
