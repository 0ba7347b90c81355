"""Products by oneDNN and by PyTorch's own choice, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn import functional

from bone_fx.errors import UsageError
from bone_fx.operators import PRODUCT, product
from bone_fx.operators.product import times
from tests.operators.saved import kept
from tests.tolerances import assert_agrees

TOKENS, INPUTS, OUTPUTS = 6, 40, 24
needs_onednn = pytest.mark.skipif(not torch._C._has_mkldnn, reason="PyTorch without oneDNN")


@pytest.fixture(params=[pytest.param(True, marks=needs_onednn), False], ids=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    everywhere(monkeypatch, onednn=request.param)
    return "onednn" if request.param else "torch"


def everywhere(monkeypatch: pytest.MonkeyPatch, *, onednn: bool = True) -> None:
    """Let oneDNN, or PyTorch's choice, take products of all sizes on any CPU."""
    monkeypatch.setattr(product, "_faster_here", lambda: onednn)
    monkeypatch.setattr(product, "FROM", 0)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("layout", ["rows", "columns", "cut"])
def test_times(library: str, bias: bool, added: bool, layout: str) -> None:
    x, b, y = numbers(TOKENS, INPUTS), numbers(OUTPUTS, seed=1), numbers(TOKENS, OUTPUTS, seed=2)
    w = {
        "rows": numbers(OUTPUTS, INPUTS, seed=3),
        "columns": numbers(INPUTS, OUTPUTS, seed=3).t(),
        "cut": numbers(OUTPUTS, INPUTS + 8, seed=3)[:, :INPUTS],
    }[layout]
    expected = x.double() @ w.double().t() + (b.double() if bias else 0)
    expected = expected + (y.double() if added else 0)
    found = times(x, w, b if bias else None, added=y.clone() if added else None)
    assert_agrees(found, expected, "output")


@pytest.mark.parametrize("shape", [(INPUTS,), (TOKENS, INPUTS), (2, 3, INPUTS), (0, INPUTS)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_is_a_linear_layer(library: str, shape: tuple[int, ...], bias: bool) -> None:
    x, w, b = numbers(*shape), numbers(OUTPUTS, INPUTS, seed=1), numbers(OUTPUTS, seed=2)
    leaves = [t.requires_grad_() for t in (x, w, *([b] if bias else []))]
    ours = PRODUCT(x, w, b if bias else None)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    theirs = functional.linear(*exact)
    assert ours.shape == theirs.shape
    assert_agrees(ours, theirs, "output")
    weights = numbers(*ours.shape, seed=4)
    found = torch.autograd.grad(ours, leaves, weights)
    expected = torch.autograd.grad(theirs, exact, weights.double())
    for gradient, other in zip(found, expected, strict=True):
        assert_agrees(gradient, other, "gradient")


def test_a_frozen_weight_keeps_no_input(library: str) -> None:
    x, w = numbers(TOKENS, INPUTS).requires_grad_(), numbers(OUTPUTS, INPUTS, seed=1)
    assert kept(lambda: PRODUCT(x, w, None), w) == []
    w.requires_grad_()
    assert kept(lambda: PRODUCT(x, w, None), x, w) == []


def test_results_may_be_changed_in_place(library: str) -> None:
    x, w = numbers(2, 3, INPUTS).requires_grad_(), numbers(OUTPUTS, INPUTS, seed=1)
    PRODUCT(x, w, None).relu_().sum().backward()
    assert_agrees(x.grad, (functional.linear(x, w) > 0).float() @ w, "gradient")


@needs_onednn
def test_second_derivatives_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    x, w = numbers(TOKENS, INPUTS).requires_grad_(), numbers(OUTPUTS, INPUTS, seed=1)
    (dx,) = torch.autograd.grad(PRODUCT(x, w, None).square().sum(), x, create_graph=True)
    with pytest.raises(UsageError, match="second derivatives"):
        dx.sum().backward()


@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_and_autocast_are_torchs(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    everywhere(monkeypatch)
    x, w = numbers(TOKENS, INPUTS).to(dtype), numbers(OUTPUTS, INPUTS, seed=1).to(dtype)
    assert torch.equal(PRODUCT(x, w, None), functional.linear(x, w))
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            PRODUCT(numbers(TOKENS, INPUTS), numbers(OUTPUTS, INPUTS), None).dtype == torch.bfloat16
        )


@needs_onednn
def test_onednn_is_given_matrices_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a sum is one number, expanded."""
    everywhere(monkeypatch)
    multiply, seen = product._ONEDNN, []

    def watched(x: Tensor, w: Tensor, *rest: object) -> Tensor:
        seen.extend([x, w])
        result: Tensor = multiply(x, w, *rest)
        return result

    monkeypatch.setattr(product, "_ONEDNN", watched)
    x, w = numbers(2, 3, INPUTS).requires_grad_(), numbers(OUTPUTS, INPUTS, seed=1)
    PRODUCT(x, w, None).sum().backward()
    assert len(seen) == 4
    assert all(m.is_contiguous() or m.t().is_contiguous() for m in seen)
    assert_agrees(x.grad, w.sum(0).expand(2, 3, INPUTS), "gradient")


@needs_onednn
def test_the_switch_of_pytorch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    monkeypatch.setattr(product, "_ONEDNN", None)
    x, w = numbers(TOKENS, INPUTS), numbers(OUTPUTS, INPUTS, seed=1)
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        assert torch.equal(PRODUCT(x, w, None), functional.linear(x, w))
    finally:
        torch._C._set_mkldnn_enabled(before)


@needs_onednn
def test_it_compiles_to_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere(monkeypatch)
    x, w = numbers(TOKENS, INPUTS).requires_grad_(), nn.Parameter(numbers(OUTPUTS, INPUTS, seed=1))
    seen: list[torch.fx.GraphModule] = []

    def watched(graph: torch.fx.GraphModule, _: object) -> Any:
        seen.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=watched)
    y = torch.compile(lambda: PRODUCT(x, w, None), backend=backend, fullgraph=True)()
    assert_agrees(y, functional.linear(x, w), "output")
    y.sum().backward()
    assert_agrees(x.grad, w.sum(0).expand(TOKENS, INPUTS), "gradient")
    forward, backward = seen
    for graph in (forward, backward):
        assert any(n.target is torch.ops.bone_fx.times.default for n in graph.graph.nodes)


@needs_onednn
@pytest.mark.parametrize("added", [True, False])
def test_the_compiled_operator_keeps_the_rules_of_operators(added: bool) -> None:
    x, w, b = numbers(TOKENS, INPUTS), numbers(INPUTS, OUTPUTS, seed=1).t(), numbers(OUTPUTS)
    y = numbers(TOKENS, OUTPUTS, seed=2) if added else None
    torch.library.opcheck(torch.ops.bone_fx.times.default, (x, w, b, y))
