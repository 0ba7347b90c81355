"""Rotary embeddings that stay outside attention read tokens whose heads lie side by side."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import rotary_embedding
from bone_fx.lower.cancel_reshapes import cancel_reshapes
from bone_fx.lower.heads.flatten_rotary import flatten_rotary
from bone_fx.lower.symbolic import is_operator, operands
from tests.framed import apply

HEADS, SIZE, WIDTH = 3, 16, 48
COS = torch.ones(20, 2)


class Heads(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        heads = x.view(x.shape[0], x.shape[1], HEADS, SIZE).transpose(1, 2)
        turned = rotary_embedding(heads, positions, COS, COS, interleaved=False)
        if self.change == "read twice":
            return turned + turned.transpose(1, 2).transpose(1, 2)
        if self.change == "heads first":
            return turned * 2.0
        return turned.transpose(1, 2).reshape(x.shape[0], x.shape[1], WIDTH) * 2.0


def graph_of(change: str) -> GraphModule:
    sizes = {0: Dim("batch"), 1: Dim("length", max=20)}
    inputs = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.int64)
    program = torch.export.export(Heads(change), inputs, dynamic_shapes=(sizes, sizes))
    return program.graph_module


def test_nothing_is_left_around_the_operator() -> None:
    result = apply(flatten_rotary, graph_of(""))
    assert result.modified
    assert not apply(flatten_rotary, result.graph_module).modified
    graph = apply(cancel_reshapes, result.graph_module).graph_module.graph
    (rotary,) = (n for n in graph.nodes if is_operator(n, "com.microsoft", "RotaryEmbedding"))
    x = operands(rotary)[0]
    assert x is not None
    assert x.op == "placeholder"
    assert rotary.meta["val"].shape[2] == WIDTH
    assert rotary.kwargs["shape"][2] == WIDTH
    (user,) = rotary.users
    assert user.target is torch.ops.aten.mul.Tensor


@pytest.mark.parametrize("change", ["read twice", "heads first"])
def test_others_stay(change: str) -> None:
    assert not apply(flatten_rotary, graph_of(change)).modified


def test_other_axes_stay() -> None:
    class Turned(nn.Module):
        def forward(self, x: Tensor, positions: Tensor) -> Tensor:
            heads = x.view(2, HEADS, SIZE, 5).transpose(2, 3)
            return rotary_embedding(heads, positions, COS, COS, interleaved=False).transpose(2, 3)

    inputs = torch.randn(2, WIDTH, 5), torch.zeros(2, 5, dtype=torch.int64)
    assert not apply(flatten_rotary, torch.export.export(Turned(), inputs).graph_module).modified
