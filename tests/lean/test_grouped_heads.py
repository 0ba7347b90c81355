"""Attention over repeated keys and values reads them as they are, where it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

import bone_fx
from bone_fx.graphs import copy_graph
from bone_fx.lean.grouped_heads import group_heads
from bone_fx.operators import ATTENTION
from tests.capture.architectures import BY_NAME
from tests.framed import modifies
from tests.tolerances import assert_agrees

aten = torch.ops.aten
BATCH, GROUPS, HEADS, TOKENS, SIZE = 2, 3, 6, 5, 8

pytestmark = pytest.mark.usefixtures("captures_once")


def repeat(x: Tensor, dim: int = 2) -> Tensor:
    count = HEADS // GROUPS
    shape = [BATCH, GROUPS, TOKENS, SIZE]
    shape.insert(dim, count)
    return x.unsqueeze(dim).expand(shape).reshape(BATCH, HEADS, TOKENS, SIZE)


class Attention(nn.Module):
    def __init__(self, dim: int = 2, cut: int | None = None) -> None:
        super().__init__()
        self.dim, self.cut = dim, cut

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        keys, values = repeat(k, self.dim), repeat(v, self.dim)
        if self.cut is not None:
            keys, values, mask = keys[:, :, : self.cut], values[:, :, : self.cut], mask[..., :3]
        return functional.scaled_dot_product_attention(q, keys, values, mask, scale=0.3)


def tensors() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(BATCH, n, TOKENS, SIZE, generator=generator, requires_grad=True)
        for n in (HEADS, GROUPS, GROUPS)
    )
    return q, k, v, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None]


def trace(module: nn.Module) -> fx.GraphModule:
    traced = torch.export.export(module, tensors(), strict=False).module(check_guards=False)
    graph: Any = traced.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    return fx.GraphModule(traced, graph)


def run(gm: fx.GraphModule, graph: fx.Graph) -> tuple[Tensor, ...]:
    given = tensors()
    (y,) = fx.GraphModule(gm, graph)(*given)
    return (y, *torch.autograd.grad(y.square().sum(), given[:3]))


def test_keys_and_values_are_read_as_they_are() -> None:
    gm = trace(Attention())
    grouped = copy_graph(gm.graph)
    assert modifies(group_heads, grouped)
    assert len(grouped.find_nodes(op="call_function", target=ATTENTION)) == 1
    assert not grouped.find_nodes(op="call_function", target=aten.expand.default)
    assert not modifies(group_heads, grouped)  # a second time there is nothing to do
    for found, expected in zip(run(gm, grouped), run(gm, gm.graph), strict=True):
        assert_agrees(found, expected, "gradient")


@pytest.mark.parametrize("module", [Attention(dim=1), Attention(cut=3)], ids=["order", "cut"])
def test_other_repetitions_stay(module: nn.Module) -> None:
    graph = copy_graph(trace(module).graph)
    before = str(graph)
    assert not modifies(group_heads, graph)
    assert str(graph) == before


def test_an_adapted_llama_runs_so() -> None:
    row = BY_NAME["llama"]
    config = bone_fx.BoneConfig(r=4, target_modules=["q_proj"])
    adapted = bone_fx.adapt(row.build(), config, row.inputs(3, 12))
    assert adapted.code.count("enable_gqa = True") == 2
    assert "enable_gqa" not in str(adapted.graph)
