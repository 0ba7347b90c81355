"""A residual addition and the norm of its sum become one operator, and only where that is true."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import simplified_layer_norm
from bone_fx.lower.fuse_norms import fuse_norms
from bone_fx.lower.symbolic import is_operator, operands
from tests.framed import apply

WIDTH = 8
FUSED = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}


class Residual(nn.Module):
    def __init__(self, kind: str, change: str) -> None:
        super().__init__()
        self.kind, self.change = kind, change
        self.scale = nn.Parameter(torch.rand(WIDTH))
        self.bias = nn.Parameter(torch.rand(WIDTH))

    def norm(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return simplified_layer_norm(x, self.scale, 1e-6)
        return nn.functional.layer_norm(x, (WIDTH,), self.scale, self.bias, 1e-5)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if self.change == "broadcast":
            b = b[:, :1]
        total = torch.add(a, b, alpha=2) if self.change == "alpha" else a + b
        early = total * 2 if self.change == "early reader" else None
        normed = self.norm(total)
        if self.change == "two norms":
            normed = normed + self.norm(total)
        return normed, total + (0 if early is None else early)


def graph_of(module: nn.Module) -> GraphModule:
    inputs = torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, WIDTH)
    return torch.export.export(module, inputs).graph_module


def fused_nodes(gm: GraphModule, kind: str) -> list[torch.fx.Node]:
    return [n for n in gm.graph.nodes if is_operator(n, "com.microsoft", FUSED[kind])]


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("change", ["", "two norms"])
def test_fuses_the_first_norm_of_a_sum(kind: str, change: str) -> None:
    result = apply(fuse_norms, graph_of(Residual(kind, change)))
    (node,) = fused_nodes(result.graph_module, kind)
    a, b = (n for n in result.graph_module.graph.nodes if n.name in ("a", "b"))
    assert operands(node)[:2] == [a, b]
    assert len(operands(node)) == (3 if kind == "rms" else 4)
    values = node.meta["val"]
    assert [tuple(v.shape) for v in values] == [(2, 3, 8), (2, 3, 1), (2, 3, 1), (2, 3, 8)]
    assert not apply(fuse_norms, result.graph_module).modified


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("change", ["broadcast", "alpha", "early reader"])
def test_leaves_what_the_operator_does_not_do(kind: str, change: str) -> None:
    result = apply(fuse_norms, graph_of(Residual(kind, change)))
    assert not result.modified
    assert not fused_nodes(result.graph_module, kind)
