"""Norms move before a transposition that leaves their rows alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import simplified_layer_norm
from bone_fx.lower.heads.move_norms import move_norms
from bone_fx.lower.symbolic import is_operator
from tests.framed import apply

TRANSPOSE = torch.ops.aten.transpose.int
LAYER_NORM = torch.ops.aten.layer_norm.default


class Heads(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return self.function(x, weight, bias) * 2.0


def graph_of(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> GraphModule:
    inputs = torch.randn(3, 5, 4, 16), torch.randn(16), torch.randn(16)
    shapes = {"x": {0: Dim("batch"), 1: Dim("length")}, "weight": None, "bias": None}
    return torch.export.export(Heads(function), inputs, dynamic_shapes=shapes).graph_module


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x.transpose(1, 2), (16,), weight, bias)


def test_a_norm_is_taken_first() -> None:
    graph = graph_of(layer_norm)
    result = apply(move_norms, graph)
    (norm,) = result.graph_module.graph.find_nodes(op="call_function", target=LAYER_NORM)
    assert norm.args[0].op == "placeholder"
    assert [user.target for user in norm.users] == [TRANSPOSE]
    x, weight, bias = torch.randn(2, 7, 4, 16), torch.randn(16), torch.randn(16)
    expected = graph(x, weight, bias)[0]
    torch.testing.assert_close(result.graph_module(x, weight, bias)[0], expected)
    assert not apply(move_norms, result.graph_module).modified


def test_an_operator_has_its_new_shape() -> None:
    graph = graph_of(lambda x, w, _: simplified_layer_norm(x.transpose(1, 2), w, 1e-5))
    result = apply(move_norms, graph).graph_module
    (norm,) = (n for n in result.graph.nodes if is_operator(n, "", "SimplifiedLayerNormalization"))
    assert [int(size) for size in norm.meta["val"].shape[2:]] == [4, 16]
    assert norm.kwargs["shape"][2:] == [4, 16]
    (back,) = norm.users
    assert back.target is TRANSPOSE
    assert int(back.meta["val"].shape[1]) == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: nn.functional.layer_norm(x.transpose(2, 3), (4,), w[:4], b[:4]),
        lambda x, w, b: nn.functional.layer_norm(x.transpose(1, 2), (5, 16)) + w + b,
        lambda x, w, b: (y := x.transpose(1, 2)) + nn.functional.layer_norm(y, (16,), w, b),
        lambda x, w, b: nn.functional.layer_norm(x, (16,), w, b).transpose(1, 2),
    ],
)
def test_others_stay(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    inputs = torch.randn(3, 5, 4, 16), torch.randn(16), torch.randn(16)
    graph = torch.export.export(Heads(function), inputs).graph_module
    assert not apply(move_norms, graph).modified
