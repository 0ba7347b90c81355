from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.onnx._internal.exporter._registration import ONNXRegistry

from bone_fx.errors import CaptureError, ExportError, PassError
from bone_fx.onnx.aten.torchlib import TorchLib
from bone_fx.onnx.prepare import prepare
from bone_fx.onnx.prepare.decompose import decompose_nodes
from bone_fx.onnx.recipe_tensor import recipe_of
from bone_fx.onnx.translate import DECOMPOSED, translate, verify_operators
from bone_fx.weights.recipes.recipe import Recipe, Value
from bone_fx.weights.storage.boxes import Box
from tests.onnx.models import Net, Tied, ops, write_and_run
from tests.tolerances import assert_agrees


class Untouchable(Recipe):
    """A recipe that nobody may evaluate."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype = tuple(tensor.shape), tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def fill(self, out: Tensor, at: Box) -> None:
        raise AssertionError("a weight was read")

    def describe(self) -> str:
        return "untouchable"


def program_of(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    return export(model, inputs, dynamic_shapes=[{0: Dim.DYNAMIC}] * len(inputs))


def fake_program(model: nn.Module, *inputs: Tensor) -> ExportedProgram:
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter, static_shapes=True)
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
    with mode:
        examples = [torch.zeros(x.shape, dtype=x.dtype) for x in inputs]
    return program_of(model, *examples)


def test_translation_reads_no_weight() -> None:
    net, x = Net().eval(), torch.randn(3, 5, 50)
    recipes = {name: Untouchable(parameter) for name, parameter in net.named_parameters()}
    model = translate(fake_program(net, x), recipes)
    bound = {name for name, v in model.graph.initializers.items() if recipe_of(v) is not None}
    assert bound == set(recipes)


def test_the_translations_are_torchlibs() -> None:
    def functions(registry: ONNXRegistry, target: object) -> list[tuple[object, bool]]:
        return [(m.onnx_function, m.is_complex) for m in registry.get_decomps(target)]  # type: ignore[arg-type]

    whole, lazy = ONNXRegistry.from_torchlib(), TorchLib()
    targets = [metas[0].fx_target for metas in whole.functions.values()]
    assert len(targets) > 300
    for target in (*targets, torch.ops.aten.lstm.input, torch.ops.aten.miopen_rnn.default):
        assert functions(lazy, target) == functions(whole, target), target


def test_a_fake_program_with_recipes_is_the_real_one(tmp_path: Path) -> None:
    net, x = Net().eval(), torch.randn(3, 5, 50)
    expected = net(x)
    recipes = {name: Value(parameter.detach()) for name, parameter in net.named_parameters()}
    model = translate(fake_program(net, x), recipes, input_names=["x"], output_names=["y"])
    (found,) = write_and_run(model, tmp_path, {"x": x})
    assert_agrees(found, expected, "output")


def test_no_weight_is_transposed_at_run_time() -> None:
    assert "Transpose" not in ops(translate(program_of(Net().eval(), torch.randn(3, 5, 50)), {}))


def test_a_tied_head_reads_the_embedding(tmp_path: Path) -> None:
    tied, ids = Tied(), torch.tensor([[1, 2, 3], [4, 5, 499]])
    model = translate(program_of(tied, ids), {}, input_names=["ids"])
    assert "FusedMatMul" in ops(model)
    assert len(model.graph.initializers) == 1
    (found,) = write_and_run(model, tmp_path, {"ids": ids})
    assert_agrees(found, tied(ids), "output")


def test_names_of_one_recipe_become_one_constant() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    bias = Value(torch.ones(6))
    model = translate(
        fake_program(net, torch.randn(3, 6)), _weights(net) | {"0.bias": bias, "1.bias": bias}
    )
    assert sorted(model.graph.initializers) == ["0.bias", "0.weight", "1.weight"]


def _weights(model: nn.Module) -> dict[str, Recipe]:
    return {name: Value(torch.zeros(p.shape)) for name, p in model.named_parameters()}


def test_a_recipe_in_another_dtype_is_cast(tmp_path: Path) -> None:
    net = nn.Linear(6, 4).eval()
    recipes = {name: Value(p.detach().double()) for name, p in net.named_parameters()}
    x = torch.randn(3, 6)
    expected = net(x)
    (found,) = write_and_run(translate(fake_program(net, x), recipes), tmp_path, {"input": x})
    assert_agrees(found, expected, "output")


def test_a_constant_without_bytes_is_named() -> None:
    net = nn.Linear(6, 4)
    with pytest.raises(ExportError, match="'bias' has no bytes"):
        translate(fake_program(net, torch.randn(3, 6)), {"weight": Value(torch.zeros(4, 6))})


def test_a_constant_of_another_shape_is_named() -> None:
    net = nn.Linear(6, 4)
    recipes = {"weight": Value(torch.zeros(6, 4)), "bias": Value(torch.zeros(4))}
    with pytest.raises(ExportError, match="'weight' has another shape"):
        translate(fake_program(net, torch.randn(3, 6)), recipes)


def test_dimensions_have_names_and_expressions_of_them() -> None:
    class Join(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b])

    program = program_of(Join(), torch.randn(3, 4), torch.randn(5, 4))
    names = {"a": {0: "past"}, "b": {0: "new"}}
    model = translate(program, {}, dim_names=names)
    assert str(model.graph.outputs[0].shape) == "[new + past,4]"
    output = model.graph.outputs[0].name or ""
    model = translate(program, {}, dim_names=names | {output: {0: "total"}})
    assert str(model.graph.outputs[0].shape) == "[total,4]"


def test_a_fixed_dimension_that_should_vary_is_named() -> None:
    program = export(nn.Linear(6, 4), (torch.randn(3, 6),))
    with pytest.raises(
        CaptureError, match=r"dimension 0 of 'input' \(batch\) has the fixed size 3"
    ):
        translate(program, {}, dim_names={"input": {0: "batch"}})


def test_nothing_of_the_trace_is_left() -> None:
    model = translate(program_of(Net().eval(), torch.randn(3, 5, 50)), {})
    things = [model, model.graph, *model.graph, *model.graph.inputs, *model.graph.outputs]
    things += list(model.graph.initializers.values())
    assert not any(thing.metadata_props or thing.doc_string for thing in things)
    assert (model.producer_name, model.ir_version) == ("bone_fx", 10)
    assert model.opset_imports[""] == 18


def test_outputs_that_are_inputs_or_twice_the_same(tmp_path: Path) -> None:
    class Same(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = x * 2
            return x, y, y

    x = torch.randn(3, 4)
    model = translate(program_of(Same(), x), {}, input_names=["x"], output_names=["a", "b", "c"])
    outputs = write_and_run(model, tmp_path, {"x": x})
    for found, expected in zip(outputs, (x, 2 * x, 2 * x), strict=True):
        assert torch.equal(found, expected)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        kept = y * 2
        y.add_(x)
        y *= kept
        return y / 2


class InPlaceOnView(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 3
        y.view(-1, 2, 3)[:, 0] = 0
        return y


class Mixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        count = (x > 0).sum(1, keepdim=True)
        return (x.half() * x + count * 0.5).to(torch.float64) + (x > 0)


class Untranslated(nn.Module):
    """Operators that torchlib does not know: they have decompositions, some in several steps."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.square(x) + nn.functional.huber_loss(x, 2 * x, reduction="none")
        spread, mean = torch.var_mean(x, 1, keepdim=True)
        return y + torch.special.entr(x.abs()) * spread - mean


class BySize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.shape[0]


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        mask = (x[:, None, None, :, 0] > -0.5) & (x[:, None, :, None, 1] > -0.5)
        return nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


class Regions(nn.Module):
    """A region without gradients in one with: two levels of subgraphs where parameters train."""

    def __init__(self, autocast: bool) -> None:
        super().__init__()
        self.linear, self.autocast = nn.Linear(6, 6), autocast

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            angle = input * 2
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
                angle = angle @ angle.mT
        return self.linear(input) + angle.float().sum()


@pytest.mark.parametrize(
    ("module", "shape", "decomposed"),
    [
        (InPlace(), (3, 6), False),
        (InPlaceOnView(), (3, 6), True),
        (Mixed(), (3, 6), False),
        (Untranslated(), (3, 6), False),
        (BySize(), (3, 6), False),
        (Masked(), (3, 7, 16), False),
        (Causal(), (3, 7, 16), False),
        (Regions(autocast=False), (3, 6), False),
        (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval(), (3, 7, 32), False),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()).eval(),
            (3, 3, 8, 8),
            None,
        ),
    ],
    ids=[
        "in place",
        "in place on a view",
        "dtypes",
        "without translation",
        "by size",
        "masked",
        "causal",
        "regions",
        "transformer",
        "conv",
    ],
)
def test_operators(
    module: nn.Module, shape: tuple[int, ...], decomposed: bool | None, tmp_path: Path
) -> None:
    with torch.no_grad():
        model = translate(program_of(module, torch.randn(shape)), {}, input_names=["x"])
        assert decomposed is None or (DECOMPOSED in model.meta) == decomposed
        for batch in (1, 4):
            x = torch.randn(batch, *shape[1:])
            (found,) = write_and_run(model, tmp_path, {"x": x})
            assert_agrees(found, module(x), "output", torch.float32)


def test_only_what_has_no_translation_is_decomposed() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.square(nn.functional.layer_norm(x, (6,)))

    prepared = prepare(program_of(Both(), torch.randn(3, 6)).graph_module)
    unknown = torch.ops.aten.square.default
    assert decompose_nodes(prepared, lambda node: node.target is unknown)
    assert not decompose_nodes(prepared, lambda node: node.target is unknown)
    targets = [node.target for node in prepared.graph.nodes if node.op == "call_function"]
    assert targets == [torch.ops.aten.layer_norm.default, torch.ops.aten.pow.Tensor_Scalar]


def test_an_operator_without_translation_is_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(x)

    with pytest.raises(ExportError, match=r"eigh|eigvalsh"):
        translate(export(Odd(), (torch.randn(3, 3),)), {})


def test_an_exporter_that_fails_in_its_own_way() -> None:
    """Its passes raise errors of any class; none of them is a fault of ours."""

    class Subtracts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            result = x.clone()
            result[:, 0].mul_(2)
            return result + (1.0 - x.long())

    with pytest.raises(ExportError, match=r"(?s)could not be translated.*aten\.sub"):
        translate(program_of(Subtracts(), torch.ones(2, 4)), {})


def test_autocast_is_left_to_the_decompositions() -> None:
    with torch.enable_grad():
        program = export(Regions(autocast=True), (torch.randn(3, 6),))
    model = translate(program, {})
    assert "wrap_with_autocast" in model.meta[DECOMPOSED]
    assert ir.DataType.BFLOAT16 in {
        node.attributes["to"].as_int() for node in model.graph if node.op_type == "Cast"
    }


def test_the_program_is_as_it_was() -> None:
    program = program_of(InPlace(), torch.randn(3, 6))
    before = str(program)
    translate(program, {})
    assert str(program) == before


@pytest.mark.parametrize(
    ("domain", "operator"), [("bone_fx", "RoutedExperts"), ("", "Attention"), ("pkg.custom", "Add")]
)
def test_a_foreign_operator_is_caught_after_translation(domain: str, operator: str) -> None:
    x = ir.Value(name="x")
    nodes = [
        ir.node("SimplifiedLayerNormalization", [x], name="norm"),
        ir.node("FastGelu", [x], domain="com.microsoft", name="gelu"),
        ir.node("Add", [x, x], name="sum"),
    ]
    graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, name="main")
    model = ir.Model(graph, ir_version=10)
    verify_operators(model)
    graph.append(ir.node(operator, [x], domain=domain, name="seeded"))
    with pytest.raises(PassError, match=f"after translation node seeded is {domain}::{operator}"):
        verify_operators(model)
