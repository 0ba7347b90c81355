"""Operators in place become plain ones only where nothing can tell."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.lower.functionalize import functionalize
from tests.framed import apply

aten = torch.ops.aten


def _graph(module: nn.Module, *args: Tensor) -> GraphModule:
    traced = torch.export.export(module, args).module(check_guards=False)
    assert isinstance(traced, GraphModule)
    return traced


class _Sum(nn.Module):
    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        product = x @ w
        product += y
        product.mul_(2.0)
        return product


class _Read(nn.Module):
    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        product = x @ w
        again = product.relu()
        product += y
        return product + again


class _View(nn.Module):
    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        product = x @ w
        product.view(-1).add_(1.0)
        return product * y


class _Given(nn.Module):
    def forward(self, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
        x.add_(1.0)
        return x @ w + y


INPUTS = torch.randn(5, 48), torch.randn(48, 80), torch.randn(5, 80)


def test_a_sum_of_its_own_is_written_plainly() -> None:
    module = _Sum()
    graph = _graph(module, *INPUTS)
    result = apply(functionalize, graph)
    targets = {node.target for node in result.graph_module.graph.nodes}
    assert result.modified
    assert aten.add_.Tensor not in targets
    assert aten.add.Tensor in targets
    assert torch.equal(result.graph_module(*INPUTS), module(*INPUTS))
    again = apply(functionalize, apply(functionalize, result.graph_module).graph_module)
    assert not again.modified
    assert not any(str(n.target).endswith("_.Tensor") for n in again.graph_module.graph.nodes)


@pytest.mark.parametrize("module", [_Read(), _View(), _Given()])
def test_what_somebody_else_sees_stays(module: nn.Module) -> None:
    graph = _graph(module, *(x.clone() for x in INPUTS))
    before = str(graph.graph)
    result = apply(functionalize, graph)
    assert not result.modified
    assert str(result.graph_module.graph) == before
