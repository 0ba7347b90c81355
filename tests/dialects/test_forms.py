"""Every form of a linear layer: found by its name, adapted, folded, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from transformers.pytorch_utils import Conv1D

import bone_fx
from bone_fx.dialects import find_module_sites, find_sites
from bone_fx.errors import SiteError


class Forms(nn.Module):
    """One layer, called in one way."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.lin = nn.Linear(50, 24)
        self.conv = Conv1D(24, 50)
        self.bare = nn.Parameter(torch.randn(24, 50))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.call(self, x))


FORMS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "module": ("lin", lambda m, x: m.lin(x)),
    "module by keyword": ("lin", lambda m, x: m.lin(input=x)),
    "twice": ("lin", lambda m, x: m.lin(x) + m.lin(x * x)),
    "conv1d": ("conv", lambda m, x: m.conv(x)),
    "functional": ("lin", lambda m, x: functional.linear(x, m.lin.weight, m.lin.bias)),
    "functional by keyword": (
        "lin",
        lambda m, x: functional.linear(x, bias=m.lin.bias, weight=m.lin.weight),
    ),
    "bare parameter": ("bare", lambda m, x: functional.linear(x, m.bare)),
    "matmul of a transposed": ("lin", lambda m, x: torch.matmul(x, m.lin.weight.t())),
    "operator": ("lin", lambda m, x: x @ m.lin.weight.T),
    "method": ("lin", lambda m, x: x.matmul(m.lin.weight.transpose(0, 1))),
    "addmm": ("lin", lambda m, x: torch.addmm(m.lin.bias, x, m.lin.weight.t())),
    "matmul [I, O]": ("conv", lambda m, x: x @ m.conv.weight),
}

METHODS: dict[str, dict[str, Any]] = {
    "bone": {"r": 16},
    "bat": {"r": 2, "init_weights": "bat"},
    "mini": {"r": 16, "init_weights": "mini", "mini_r": 8},
}


def traced(kind: str, module: nn.Module, x: Tensor) -> fx.GraphModule:
    if kind == "symbolic_trace":
        return fx.symbolic_trace(module)
    return torch.export.export(module, (x,)).module(check_guards=False)  # type: ignore[return-value]


@pytest.mark.parametrize("kind", ["symbolic_trace", "torch.export"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_form(form: str, kind: str, method: str) -> None:
    name, call = FORMS[form]
    x = torch.randn(3, 50)
    gm = traced(kind, Forms(call).eval(), x)
    before, code = gm(x), gm.code
    flags = {n: p.requires_grad for n, p in gm.named_parameters()}
    assert [site.name for site in find_sites(gm).sites] == [name]
    config = bone_fx.BoneConfig(**METHODS[method], target_modules=[name])
    result = bone_fx.insert_adapters(gm, config)
    adapted = result.graph_module
    assert [site.name for site in result.applied] == [name]
    torch.testing.assert_close(adapted(x), before)
    blocks = [p for p in adapted.parameters() if p.requires_grad]
    assert len(blocks) == 1
    adapted(x).sum().backward()
    assert blocks[0].grad is not None
    with torch.no_grad():
        blocks[0].normal_(std=0.1)
    tuned = adapted(x)
    assert float((tuned - before).detach().abs().max()) > 1e-3
    folded = bone_fx.fold_adapters(adapted)
    assert folded.modified
    torch.testing.assert_close(folded.graph_module(x), tuned, rtol=0, atol=1e-5)
    assert set(folded.graph_module.state_dict()) <= set(gm.state_dict())
    again = bone_fx.fold_adapters(folded.graph_module)
    assert not again.modified
    assert gm.code == code
    assert {n: p.requires_grad for n, p in gm.named_parameters()} == flags
    torch.testing.assert_close(gm(x), before, rtol=0, atol=0)


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


def test_what_is_more_than_a_product_is_refused_by_name() -> None:
    class LeafTracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.Linear)

    net = nn.Sequential(Tripled(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].register_forward_hook(lambda _module, _args, output: 2 * output)
    gm = fx.GraphModule(net, LeafTracer().trace(net))
    result = bone_fx.insert_adapters(gm, bone_fx.BoneConfig(r=4, target_modules=["0", "1", "2"]))
    assert [site.name for site in result.applied] == ["2"]
    assert {refusal.name for refusal in result.refused} == {"0", "1"}
    x = torch.randn(2, 8)
    torch.testing.assert_close(result.graph_module(x), gm(x))


def test_a_weight_that_a_module_reads_too_is_refused() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = Tripled(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) + functional.linear(x, self.lin.weight)

    class LeafTracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, nn.Linear)

    net = Both()
    gm = fx.GraphModule(net, LeafTracer().trace(net))
    with pytest.raises(SiteError, match="lin"):
        bone_fx.insert_adapters(gm, bone_fx.BoneConfig(r=4, target_modules=["lin"]))


class Residual(nn.Module):
    """A layer, and a product that adds a matrix in place of a bias."""

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(50, 24)
        self.up = nn.Parameter(torch.randn(50, 24))
        self.rows = nn.Parameter(torch.randn(1, 24))
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        view = self.lin.weight.t()
        weight = view if self.shared else self.up
        return torch.addmm(torch.addmm(self.rows, x, weight), x, weight) + x @ view


@pytest.mark.parametrize("kind", ["symbolic_trace", "torch.export"])
def test_a_matrix_that_is_added_is_no_bias(kind: str) -> None:
    x = torch.randn(3, 50)
    gm = traced(kind, Residual(), x)
    assert [site.name for site in find_sites(gm).sites] == ["lin"]
    config = bone_fx.BoneConfig(r=8, target_modules=["lin", "up"], init_weights=False)
    result = bone_fx.insert_adapters(gm, config)
    assert "addmm" in {refusal.name: refusal.reason for refusal in result.refused}["up"]
    result.graph_module(x).sum().backward()
    folded = bone_fx.fold_adapters(result.graph_module).graph_module
    torch.testing.assert_close(folded(x), result.graph_module(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["symbolic_trace", "torch.export"])
@pytest.mark.parametrize("untie", [False, True])
def test_a_transposed_view_that_another_product_reads_is_refused(kind: str, untie: bool) -> None:
    gm = traced(kind, Residual(shared=True), torch.randn(3, 50))
    with pytest.raises(SiteError, match="addmm"):
        bone_fx.insert_adapters(gm, bone_fx.BoneConfig(r=8, target_modules=["lin"]), untie=untie)


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


def _weight_norm(linear: nn.Linear) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return torch.nn.utils.weight_norm(linear)


def _buffer(linear: nn.Linear) -> nn.Module:
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)
    return linear


COMPUTED: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "weight norm": _weight_norm,
    "spectral norm": lambda linear: torch.nn.utils.spectral_norm(linear).eval(),
    "pruned": lambda linear: prune.random_unstructured(linear, "weight", 0.5),  # type: ignore[no-untyped-call]
    "weight norm as parametrization": parametrizations.weight_norm,
    "spectral norm as parametrization": parametrizations.spectral_norm,
    "own parametrization": lambda linear: parametrize.register_parametrization(
        linear, "weight", _Symmetric()
    ),
    "buffer": _buffer,
}


# torch.export says so of every module whose hook writes an attribute.
ASSIGNS = "ignore:The tensor attribute self.0.weight was assigned during export"


@pytest.mark.filterwarnings(ASSIGNS)
@pytest.mark.parametrize("kind", ["symbolic_trace", "torch.export"])
@pytest.mark.parametrize("how", COMPUTED)
def test_a_weight_that_is_no_parameter_is_refused(how: str, kind: str) -> None:
    net = nn.Sequential(COMPUTED[how](nn.Linear(24, 24)), nn.ReLU(), nn.Linear(24, 24)).eval()
    x = torch.randn(3, 24)
    config = bone_fx.BoneConfig(r=8, target_modules=["0", "2"], init_weights=False)
    result = bone_fx.insert_adapters(traced(kind, net, x), config)
    assert [site.name for site in result.applied] == ["2"]
    assert {refusal.name.partition(".")[0] for refusal in result.refused} == {"0"}
    folded = bone_fx.fold_adapters(result.graph_module).graph_module
    torch.testing.assert_close(folded(x), result.graph_module(x), rtol=0, atol=1e-5)
    sites, others = find_module_sites(net)
    assert [site.name for site in sites] == ["2"]
    assert "no parameter" in {refusal.name: refusal.reason for refusal in others}["0"]


@pytest.mark.filterwarnings(ASSIGNS)
@pytest.mark.parametrize("how", ["weight norm", "own parametrization"])
def test_a_model_with_a_computed_weight_comes_back_merged(how: str) -> None:
    net = nn.Sequential(COMPUTED[how](nn.Linear(24, 24)), nn.ReLU(), nn.Linear(24, 24)).eval()
    x = torch.randn(3, 24)
    config = bone_fx.BoneConfig(r=8, target_modules=["0", "2"], init_weights=False)
    with pytest.warns(UserWarning, match="were not adapted: 0"):
        adapted = bone_fx.adapt(net, config, (x,))
    assert {refusal.name.partition(".")[0] for refusal in adapted.refused} == {"0"}
    torch.testing.assert_close(adapted.merge_and_unload()(x), adapted(x), rtol=0, atol=1e-5)


def test_a_bias_that_is_computed_is_refused_where_the_layer_is_called() -> None:
    """A trace of the product itself has the computed bias as a value, and takes the adapter."""
    net = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    parametrize.register_parametrization(net[0], "bias", nn.Identity())
    config = bone_fx.BoneConfig(r=8, target_modules=["0", "1"])
    for kind, names in (("symbolic_trace", ["1"]), ("torch.export", ["0", "1"])):
        result = bone_fx.insert_adapters(traced(kind, net, torch.randn(3, 24)), config)
        assert [site.name for site in result.applied] == names
        assert "bias" in str(result.refused) or names == ["0", "1"]


def test_dropout_of_an_adapter_follows_the_mode() -> None:
    net = nn.Sequential(nn.Linear(48, 24), nn.ReLU(), nn.BatchNorm1d(24))
    gm = fx.symbolic_trace(net)
    config = bone_fx.BoneConfig(r=16, target_modules=["0"], init_weights=False, miss_dropout=0.4)
    adapted = bone_fx.insert_adapters(gm, config).graph_module
    x = torch.randn(5, 48)
    adapted.train()
    assert not torch.equal(adapted(x), adapted(x))
    assert int(gm.get_buffer("2.num_batches_tracked")) == 0
    adapted.eval()
    assert torch.equal(adapted(x), adapted(x))
    folded = bone_fx.fold_adapters(adapted).graph_module.eval()
    torch.testing.assert_close(folded(x), adapted(x), rtol=0, atol=1e-5)
    assert set(folded.state_dict()) == set(net.state_dict())
