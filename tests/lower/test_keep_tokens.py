"""Operators on flattened tokens see the tokens as they come; what is needed flat stays flat."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from bone_fx.lower.keep_tokens import keep_tokens
from tests.framed import apply

VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class Block(nn.Module):
    def __init__(self, function: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.norm = nn.LayerNorm(48)
        self.up, self.down = nn.Linear(48, 80), nn.Linear(80, 48, bias=False)
        self.square = nn.Linear(48, 48)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def back(y: Tensor, x: Tensor) -> Tensor:
    return y.view(x.shape[0], x.shape[1], y.shape[-1])


def whole_block(m: Block, x: Tensor) -> Tensor:
    y = flat(x)
    return back(y + m.down(torch.relu(m.up(m.norm(y)))), x)


def gated(m: Block, x: Tensor) -> Tensor:
    y = flat(x)
    return back(m.down(nn.functional.silu(m.up(y)) * (m.up(flat(x)) * 0.5)), x)


def two_results(m: Block, x: Tensor) -> Tensor:
    y = m.square(flat(x))
    return back(y, x) + back(torch.tanh(y), x)


def read_flat(m: Block, x: Tensor) -> Tensor:
    y = m.square(flat(x))
    return back(y, x) + y.sum(0)


def partly_read_flat(m: Block, x: Tensor) -> Tensor:
    y = flat(x)
    return back(m.square(y), x) + torch.cumsum(y, 0).sum()


def turned(m: Block, x: Tensor) -> Tensor:
    return m.square(flat(x)).view(x.shape[1], x.shape[0], 48)


def with_a_flat_stranger(m: Block, x: Tensor) -> Tensor:
    return back(m.square(flat(x)) + flat(x.transpose(0, 1)), x)


def weight_made_of_tokens(m: Block, x: Tensor) -> Tensor:
    return back(nn.functional.linear(flat(x), flat(x[:1, :1].expand(1, 48, 48))), x)


def softmax_over_tokens(m: Block, x: Tensor) -> Tensor:
    return back(torch.softmax(flat(x), 0), x)


def graph_of(function: Callable[[Block, Tensor], Tensor]) -> tuple[Block, GraphModule]:
    torch.manual_seed(0)
    model = Block(function).eval()
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
    program = torch.export.export(model, (torch.randn(3, 5, 48),), dynamic_shapes=shapes)
    return model, program.graph_module


def views(gm: GraphModule) -> int:
    return sum(node.target in VIEWS for node in gm.graph.nodes)


def same(model: Block, gm: GraphModule) -> None:
    for shape in ((2, 7, 48), (3, 5, 48)):
        x = torch.randn(shape)
        (found,) = gm(*dict(model.named_parameters()).values(), x)
        torch.testing.assert_close(found, model(x))


@pytest.mark.parametrize(
    ("function", "left"),
    [(whole_block, 0), (gated, 0), (two_results, 0), (partly_read_flat, 1)],
)
def test_views_go(function: Callable[[Block, Tensor], Tensor], left: int) -> None:
    model, graph = graph_of(function)
    result = apply(keep_tokens, graph)
    assert result.modified
    assert views(result.graph_module) == left
    for node in result.graph_module.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            assert node.meta["val"].dim() == 3
    same(model, result.graph_module)
    assert not apply(keep_tokens, result.graph_module).modified


@pytest.mark.parametrize(
    "function",
    [read_flat, turned, with_a_flat_stranger, weight_made_of_tokens, softmax_over_tokens],
)
def test_others_stay(function: Callable[[Block, Tensor], Tensor]) -> None:
    model, graph = graph_of(function)
    assert views(graph) > 0
    result = apply(keep_tokens, graph)
    assert not result.modified
    same(model, result.graph_module)
