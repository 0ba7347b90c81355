"""Pieces of heads are columns of their projection."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.lower.find_linears import find_linears
from bone_fx.lower.heads.cut_columns import cut_columns
from tests.framed import apply

aten = torch.ops.aten


class _HeadsOfOne(nn.Module):
    """Heads of k and v behind those of q."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.view(3, 7, 6, 8)
        return heads[:, :, :-2], heads[:, :, -2:-1], heads[:, :, 5:]


class _SideBySide(nn.Module):
    """q, k and v of each head side by side."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.view(3, 7, 2, 3, 8)
        return heads[..., 0, :], heads[..., 1, :], heads[..., -1, :]


class _Grouped(nn.Module):
    """Groups of queries beside their key and value."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.view(3, 7, 2, 3, 8)
        return heads[:, :, :, :1], heads[:, :, :, 1:].flatten(2, 3)


class _Other(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = x.view(3, 7, 6, 8)
        return heads[:, 2:4], heads[:, :, ::2], heads[..., :4], heads.transpose(2, 3)[:, :, 1:3]


def _graph(module: nn.Module, *given: Tensor) -> GraphModule:
    traced = torch.export.export(module, given).module(check_guards=False)
    assert isinstance(traced, GraphModule)
    return traced


@pytest.mark.parametrize("module", [_HeadsOfOne(), _SideBySide(), _Grouped()])
def test_pieces_of_heads_are_cut_from_the_last_axis(module: nn.Module) -> None:
    x = torch.randn(3, 7, 48)
    graph = _graph(module, x)
    result = apply(cut_columns, graph)
    assert result.modified
    for one, other in zip(result.graph_module(x), module(x), strict=True):
        assert torch.equal(one, other)
    for node in result.graph_module.graph.nodes:
        assert node.target is not aten.select.int
        if node.target is aten.slice.Tensor:
            assert node.args[1] == node.meta["val"].dim() - 1
    assert not apply(cut_columns, result.graph_module).modified


def test_other_pieces_stay() -> None:
    graph = _graph(_Other(), torch.randn(3, 7, 48))
    assert not apply(cut_columns, graph).modified


class _Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(80, 48))
        self.square = nn.Parameter(torch.randn(80, 80))
        self.bias = nn.Parameter(torch.randn(80))
        self.row = nn.Parameter(torch.randn(7, 80))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T + self.bias
        y = y @ self.square.t()
        y = self.row + y @ self.square.transpose(0, 1)
        return y @ self.square


def test_products_with_transposed_weights_are_linear() -> None:
    module, x = _Products(), torch.randn(3, 7, 48)
    program = torch.export.export(module, (x,))
    result = apply(find_linears, program.graph_module)
    targets = [n.target for n in result.graph_module.graph.nodes]
    assert [targets.count(t) for t in (aten.linear.default, aten.matmul.default)] == [3, 1]
    assert targets.count(aten.add.Tensor) == 1
    (found,) = result.graph_module(module.weight, module.square, module.bias, module.row, x)
    assert torch.allclose(found, module(x), rtol=1e-5, atol=1e-4)
    assert not apply(find_linears, result.graph_module).modified
