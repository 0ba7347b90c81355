"""Reshapes and transpositions that undo each other leave the graph; the others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from bone_fx.lower.cancel_reshapes import cancel_reshapes
from bone_fx.lower.table import PASSES
from bone_fx.passes.frame import Frame
from tests.framed import apply

aten = torch.ops.aten


class Heads(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * 2.0


def graph_of(function: Callable[[Tensor], Tensor]) -> GraphModule:
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}}
    program = torch.export.export(Heads(function), (torch.randn(3, 5, 48),), dynamic_shapes=shapes)
    return program.graph_module


def split(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], 3, 16).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().reshape(x.shape[0], x.shape[2], 48)


def test_a_copy_that_shields_a_tensor_stays() -> None:
    gm, x = graph_of(lambda x: x.clone().mul_(2.0) + x), torch.randn(3, 5, 48)
    expected, before = gm(x.clone())[0], str(gm.graph)
    (row,) = (row for row in PASSES if row.run is cancel_reshapes)
    outcome = Frame(gm.graph).run_row(row)
    assert not outcome.modified
    assert "no_mutable_operators, and mul_ is aten.mul_" in outcome.refused[0].reason
    assert str(gm.graph) == before
    assert torch.equal(gm(x)[0], expected)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: join(split(x)), 0),
        (lambda x: x.view(x.shape[0], x.shape[1], 6, 8).view(x.shape[0], -1, 3, 16), 1),
        (lambda x: x.reshape(x.shape[0], x.shape[1], 48), 0),
        (split, 2),
        (lambda x: split(x).transpose(2, 3), 3),
        (lambda x: split(x).contiguous().view(x.shape[0], 3, -1), 3),
        (lambda x: x.transpose(-1, -2).transpose(1, 2), 0),
    ],
)
def test_only_what_changes_nothing_goes(function: Callable[[Tensor], Tensor], left: int) -> None:
    graph = graph_of(function)
    result = apply(cancel_reshapes, graph)
    moving = [aten.view.default, aten.reshape.default, aten.transpose.int, aten.contiguous.default]
    assert sum(n.target in moving for n in result.graph_module.graph.nodes) == left
    for shape in ((3, 5, 48), (2, 7, 48)):
        x = torch.randn(shape)
        assert torch.equal(result.graph_module(x)[0], graph(x)[0])
    again = apply(cancel_reshapes, result.graph_module)
    assert not again.modified
