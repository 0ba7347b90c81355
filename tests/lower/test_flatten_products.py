"""Products on flattened tokens become products on the tokens; others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D

from bone_fx.lower.flatten_products import flatten_products
from tests.framed import apply

aten = torch.ops.aten


class Product(nn.Module):
    def __init__(self, function: Callable[[Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.layer = Conv1D(80, 48)
        nn.init.normal_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.layer)


def graph_of(model: nn.Module) -> GraphModule:
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
    program = torch.export.export(model, (torch.randn(3, 5, 48),), dynamic_shapes=shapes)
    return program.graph_module


def targets(gm: GraphModule) -> list[object]:
    return [n.target for n in gm.graph.nodes if n.op == "call_function"]


def flattened(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.addmm(layer.bias, x.view(-1, 48), layer.weight)


def turned(x: Tensor, layer: nn.Module) -> Tensor:
    return flattened(x, layer).view(x.shape[1], x.shape[0], 80)


def read_twice(x: Tensor, layer: nn.Module) -> Tensor:
    flat = flattened(x, layer)
    return flat.view(x.shape[0], x.shape[1], 80) + flat.sum()


def test_conv1d_is_a_linear() -> None:
    model = Product(lambda x, layer: layer(x))
    graph = graph_of(model)
    result = apply(flatten_products, graph)
    assert result.modified
    assert aten.addmm.default not in targets(result.graph_module)
    assert not any(
        t in (aten.view.default, aten.reshape.default) for t in targets(result.graph_module)
    )
    x = torch.randn(2, 7, 48)
    (found,) = result.graph_module(model.layer.weight, model.layer.bias, x)
    torch.testing.assert_close(found, model(x))
    assert not apply(flatten_products, result.graph_module).modified


@pytest.mark.parametrize("function", [flattened, turned, read_twice])
def test_others_stay(function: Callable[[Tensor, nn.Module], Tensor]) -> None:
    graph = graph_of(Product(function))
    assert aten.addmm.default in targets(graph)
    assert not apply(flatten_products, graph).modified
