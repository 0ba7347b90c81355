"""Products with a transposed weight are linear layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bone_fx.lower.find_linears import find_linears
from tests.framed import apply

aten = torch.ops.aten


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
