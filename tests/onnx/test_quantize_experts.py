"""Mixtures of experts become QMoE, whose kernel for the CPU equals rounded experts' mixture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from bone_fx.errors import VerificationError
from bone_fx.onnx.quantize_experts import SCALE_DTYPE, QuantizeExperts
from bone_fx.onnx.recipe_tensor import set_recipe
from bone_fx.onnx.writer import write_model
from bone_fx.verify.compare_experts import load_experts
from bone_fx.verify.graph import WrittenGraph, keep_activations
from bone_fx.weights.recipes.experts import ExpertsPart
from bone_fx.weights.recipes.nbits import Scheme, quantize
from bone_fx.weights.recipes.recipe import Value
from bone_fx.weights.recipes.second_moments import SecondMoments

T, X, H, I, C = 9, 5, 64, 96, 2  # noqa: E741 - tokens, experts, hidden, inner, chosen
CONTRIB = "com.microsoft"
ALPHA, BETA, LIMIT = 1.7, 1.0, 2.0


def weights(inner: int = I) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "up": (X, 2 * inner, H),
        "up_bias": (X, 2 * inner),
        "down": (X, H, inner),
        "down_bias": (X, H),
    }
    return {name: torch.randn(*s, generator=generator) * 0.2 for name, s in shapes.items()}


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(T, H, generator=generator),
        "scores": torch.randn(T, X, generator=generator),
    }


def model_of(normalized: bool = True, inner: int = I, **attributes: Any) -> ir.Model:
    """A MoE of weights with biases."""
    floats = ir.TensorType(ir.DataType.FLOAT)
    x, scores = (
        ir.Value(name=n, type=floats, shape=ir.Shape(v.shape)) for n, v in inputs().items()
    )
    constants = []
    for name, tensor in weights(inner).items():
        constants.append(ir.Value(name=f"experts.{name}"))
        set_recipe(constants[-1], Value(tensor))
    attributes = {
        "k": C, "activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": ALPHA,
        "activation_beta": BETA, "swiglu_limit": LIMIT,
        "normalize_routing_weights": int(normalized), **attributes,
    }  # fmt: skip
    node = ir.node("MoE", [x, scores, *constants], attributes, domain=CONTRIB)
    (y,) = node.outputs
    y.name, y.type, y.shape = "y", floats, ir.Shape([T, H])
    graph = ir.Graph(
        [x, scores], [y], nodes=[node], initializers=constants,
        opset_imports={"": 18, CONTRIB: 1}, name="mixture",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def mixture(up: Tensor, down: Tensor, *, normalized: bool) -> Tensor:
    """The definition, token by token."""
    given = weights(down.shape[2])
    rows = []
    for x_H, scores_X in zip(*inputs().values(), strict=True):
        probabilities = scores_X.softmax(-1)
        chosen = probabilities.topk(C).indices
        total = probabilities[chosen].sum() if normalized else 1.0
        row = torch.zeros(H)
        for e in chosen:
            both = up[e] @ x_H + given["up_bias"][e]
            gate, linear = both[::2].clamp(max=LIMIT), both[1::2].clamp(-LIMIT, LIMIT)
            gated = gate * torch.sigmoid(ALPHA * gate) * (linear + BETA)
            row += probabilities[e] / total * (down[e] @ gated + given["down_bias"][e])
        rows.append(row)
    return torch.stack(rows)


def rounded(name: str, scheme: Scheme) -> Tensor:
    return torch.stack([quantize(w, scheme).values() for w in weights()[name]])


def run(folder: Path, *edits: Any) -> Tensor:
    session = WrittenGraph(folder / "model.onnx", "cpu").session(*edits)
    feeds = {name: value.numpy() for name, value in inputs().items()}
    return torch.from_numpy(session.run(None, feeds)[0])


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_graph_computes_with_the_rounded_experts(
    bits: int, symmetric: bool, normalized: bool, tmp_path: Path
) -> None:
    model = model_of(normalized)
    step = QuantizeExperts(Scheme(bits, 16, symmetric), "cpu", accuracy_level=4)
    assert step(model).modified
    assert not step(model).modified
    scheme = Scheme(bits, 32, symmetric, SCALE_DTYPE)
    expected = mixture(rounded("up", scheme), rounded("down", scheme), normalized=normalized)
    write_model(model, tmp_path)
    # Activations in int8 are what a user runs; without them it is exact.
    assert WrittenGraph(tmp_path / "model.onnx", "cpu").rounds_activations()
    assert 1e-4 < difference(run(tmp_path), expected) < 0.05
    assert difference(run(tmp_path, keep_activations), expected) < 1e-5


def test_nothing_but_codes_scales_and_zero_points_is_written() -> None:
    model = model_of()
    step = QuantizeExperts(Scheme(4, 16), "cpu")
    step(model)
    parts = [f"experts.{w}.{p}" for w in ("up", "down") for p in ("codes", "scales", "zero_points")]
    biases = ["experts.up_bias", "experts.down_bias"]
    assert sorted(model.graph.initializers) == sorted(parts + biases)
    nbytes = {n: v.const_value.nbytes for n, v in model.graph.initializers.items() if v.const_value}
    in_fp16 = 2 * sum(weights()[name].numel() for name in ("up", "down"))
    assert sum(nbytes[name] for name in parts) <= 0.29 * in_fp16
    assert step.done.weights == ["experts.up", "experts.down"]
    assert (step.done.block_sizes, step.done.kept, step.done.weighted) == ([32], {}, [])


@pytest.mark.parametrize(
    ("inner", "chosen", "size"), [(96, 16, 32), (128, 256, 64), (320, 128, 64), (96, 64, 32)]
)
def test_block_size_is_the_nearest_that_both_products_take(
    inner: int, chosen: int, size: int
) -> None:
    step = QuantizeExperts(Scheme(4, chosen), "cpu")
    step(model_of(inner=inner))
    assert step.done.block_sizes == [size]


@pytest.mark.parametrize(
    ("provider", "inner", "attributes", "reason"),
    [
        ("cuda", 96, {}, "multiples of 64"),
        ("cpu", 80, {}, "block size"),
        ("cpu", 96, {"swiglu_fusion": 2}, "interleaved"),
    ],
)
def test_experts_that_stay_are_told(
    provider: str, inner: int, attributes: dict[str, Any], reason: str
) -> None:
    model = model_of(inner=inner, **attributes)
    step = QuantizeExperts(Scheme(4, 32), provider)
    assert not step(model).modified
    assert set(step.done.kept) == {"experts.up", "experts.down"}
    ((dtype, why), nbytes), *others = step.done.kept_bytes.items()
    assert not others
    assert (dtype, nbytes) == ("float32", 4 * 3 * X * H * inner)
    assert reason in why


def test_scales_are_chosen_for_the_inputs_where_these_are_known() -> None:
    model = model_of()
    up, down = (model.graph.initializers[f"experts.{n}"].const_value for n in ("up", "down"))
    measured = SecondMoments(torch.rand(H), torch.zeros(H, 0))
    moments = {id(each.recipe): measured for each in (up, down)}  # type: ignore[union-attr]  # of recipes
    step = QuantizeExperts(Scheme(4, 32), "cpu", moments=moments)
    step(model)
    assert step.done.weighted == ["experts.up"]  # H numbers are not down's
    part = model.graph.initializers["experts.up.codes"].const_value.recipe  # type: ignore[union-attr]  # of recipes
    assert isinstance(part, ExpertsPart)
    assert "second moments" in part.describe()


class Mixture(torch.nn.Module):
    """A model whose experts keep their weights in some layout."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.up = torch.nn.Parameter(up)
        self.experts.down = torch.nn.Parameter(down)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("in_turns", [True, False])
def test_written_experts_are_loaded_as_the_model_keeps_them(
    in_turns: bool, transposed: bool, tmp_path: Path
) -> None:
    model = model_of()
    QuantizeExperts(Scheme(4, 32), "cpu")(model)
    write_model(model, tmp_path)

    def kept(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        if in_turns:
            up = torch.cat((up[:, ::2], up[:, 1::2]), dim=1)
        return (up.mT, down.mT) if transposed else (up, down)

    reference = Mixture(*kept(weights()["up"], weights()["down"]))
    assert load_experts(tmp_path / "model.onnx", reference, 0) == 2
    scheme = Scheme(4, 32, scale_dtype=SCALE_DTYPE)
    expected = kept(rounded("up", scheme), rounded("down", scheme))
    for found, values in zip(reference.parameters(), expected, strict=True):
        assert torch.equal(found, values)


def test_an_expert_that_is_another_is_named(tmp_path: Path) -> None:
    model = model_of()
    QuantizeExperts(Scheme(4, 32), "cpu")(model)
    write_model(model, tmp_path)
    up, down = weights()["up"], weights()["down"]
    down[3, 5, 7] += 0.2
    with pytest.raises(VerificationError, match=r"(?s)experts\.down, expert 3: .* steps off"):
        load_experts(tmp_path / "model.onnx", Mixture(up, down), 0)
    with pytest.raises(VerificationError, match=r"(?s)experts\.up, expert 0: .* differ by"):
        load_experts(tmp_path / "model.onnx", Mixture(up.flip(0), down), 0)
    with pytest.raises(VerificationError, match=r"experts\.up\.codes: its mixture rounds"):
        load_experts(tmp_path / "model.onnx", Mixture(up, down), 4)
