"""Norms, gated products and rotary embeddings become operators where these compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from bone_fx.graphs import copy_graph
from bone_fx.lean.chains import keep_less
from bone_fx.operators import GATE_PRODUCT, RMS_NORM, ROTARY
from tests.framed import modifies
from tests.tolerances import assert_agrees

aten = torch.ops.aten
ASSERTION = aten._assert_tensor_metadata.default


class Function(nn.Module):
    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.run(x, y)


def rate(x: Tensor) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)


def tanh_gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def trace(
    run: Callable[..., Tensor], x: Tensor | None = None, y: Tensor | None = None
) -> tuple[fx.GraphModule, tuple[Tensor, Tensor]]:
    made = tuple(torch.randn(3, 10) if t is None else t for t in (x, y))
    traced = torch.export.export(Function(run), made, strict=False).module(check_guards=False)
    graph: fx.Graph = traced.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    for node in graph.find_nodes(op="call_function", target=ASSERTION):  # a capture has none
        graph.erase_node(node)
    return fx.GraphModule(traced, graph), made


def operators(graph: fx.Graph) -> list[Any]:
    return [node.target for node in graph.nodes if node.op == "call_function"]


def turned(x: Tensor, half: int = 5) -> Tensor:
    return torch.cat([-x[:, half:], x[:, :half]], -1)


NORMS: dict[str, Callable[..., Tensor]] = {
    "x first": lambda x, y: x * rate(x) * y,
    "rate first": lambda x, y: y * (rate(x) * x),
    "in float32 already": lambda x, y: (x.float() * rate(x.float())).to(x.dtype) * y,
}
GAINS: dict[str, Callable[..., Tensor]] = {
    "gain first": lambda x, y: y[0] * (x * rate(x)),
    "gain last": lambda x, y: (x * rate(x)) * y[0],
    "in float32 already": lambda x, y: y[0] * (x * rate(x)).float(),
    "one and a gain": lambda x, y: (x * rate(x)) * (1.0 + y[0]),
    "a gain of another": lambda x, y: y[0] * (x * rate(x)) + y,
}
ROTARIES: dict[str, Callable[..., Tensor]] = {
    "in halves": lambda x, y: x * y.cos() + turned(x) * y.sin(),
    "tables first": lambda x, y: y.sin() * turned(x) + y.cos() * x,
    "one table for all": lambda x, y: x * y[:1].cos() + turned(x) * y[1].sin(),
}
GATES: dict[str, Callable[..., Tensor]] = {
    "silu": lambda x, y: functional.silu(x) * y,
    "silu, up first": lambda x, y: y * functional.silu(x),
    "gelu": lambda x, y: functional.gelu(x) * y,
    "gelu_tanh": lambda x, y: tanh_gelu(x) * y,
    "of itself": lambda x, y: functional.silu(x) * x + y,
}
OTHERS: dict[str, Callable[..., Tensor]] = {
    "the rate is read twice": lambda x, y: x * (r := rate(x)) + y * r,
    "another dimension": lambda x, y: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-5),
    "a cube": lambda x, y: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-5),
    "the rate of another": lambda x, y: y * rate(x),
    "an eps that is a tensor": lambda x, y: (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + y[:, :1].abs())
    ),
    "the activation is read twice": lambda x, y: (s := functional.silu(x)) * y + s,
    "a gate of one column": lambda x, y: functional.silu(x[:, :1]) * y,
    "an up of another dtype": lambda x, y: functional.silu(x) * y.double(),
    "another activation": lambda x, y: torch.relu(x) * y,
    "a rotary embedding of thirds": lambda x, y: x * y.cos() + turned(x, 4) * y.sin(),
    "a rotary embedding of another": lambda x, y: y * y.cos() + turned(x) * y.sin(),
    "one whose halves are read again": lambda x, y: x * y + (t := turned(x)) * y + t,
    "one that widens": lambda x, y: x[:1] * y + turned(x[:1]) * y,
    "one turned the other way": lambda x, y: x * y + torch.cat([x[:, 5:], -x[:, :5]], -1) * y,
    "a number": lambda x, y: functional.silu(x) * 2 + y,
}


def assert_same(run: Callable[..., Tensor], target: Any) -> None:
    gm, made = trace(run)
    lean = copy_graph(gm.graph)
    assert modifies(keep_less, lean)
    lean.lint()
    assert operators(lean).count(target) == 1
    replaced = {aten.rsqrt.default, aten.silu.default, aten.gelu.default, aten.cat.default}
    assert not replaced & {*operators(lean)}
    (node,) = (n for n in lean.nodes if n.target is target)
    assert node.meta["val"].shape == (3, 10)
    before = str(lean)
    assert not modifies(keep_less, lean)
    assert str(lean) == before
    leaves = [tensor.requires_grad_() for tensor in made]
    (ours,), (theirs,) = fx.GraphModule(gm, lean)(*leaves), gm(*leaves)
    assert torch.equal(ours, theirs)
    weights = torch.linspace(-1, 1, 30).view(3, 10)
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, weights),
        torch.autograd.grad(theirs, leaves, weights),
        strict=True,
    ):
        assert_agrees(found, expected, "output")


@pytest.mark.parametrize("case", NORMS)
def test_norms_keep_one_number_a_token(case: str) -> None:
    assert_same(NORMS[case], RMS_NORM)


@pytest.mark.parametrize("case", GAINS)
def test_norms_take_their_gain(case: str) -> None:
    assert_same(GAINS[case], RMS_NORM)
    lean = copy_graph(trace(GAINS[case])[0].graph)
    keep_less(lean)
    (node,) = (n for n in lean.nodes if n.target is RMS_NORM)
    assert node.args[1] is not None


@pytest.mark.parametrize("case", ROTARIES)
def test_rotary_embeddings_are_one_operator(case: str) -> None:
    assert_same(ROTARIES[case], ROTARY)


@pytest.mark.parametrize("case", GATES)
def test_gated_products_keep_their_inputs(case: str) -> None:
    assert_same(GATES[case], GATE_PRODUCT)


@pytest.mark.parametrize("case", OTHERS)
def test_others_are_left_alone(case: str) -> None:
    gm, _ = trace(OTHERS[case])
    before = str(gm.graph)
    assert not modifies(keep_less, gm.graph)
    assert str(gm.graph) == before


def test_a_norm_in_half_precision_is_left_alone_and_a_gate_is_not() -> None:
    half = torch.randn(3, 10).to(torch.bfloat16)
    gm, _ = trace(NORMS["x first"], half, half)
    assert not modifies(keep_less, gm.graph)
    gm, _ = trace(GATES["silu"], half, half)
    assert modifies(keep_less, gm.graph)
