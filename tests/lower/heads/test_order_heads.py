"""Projections packed head by head are put in order where one attention operator takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import group_query_attention
from bone_fx.lower.heads.order_heads import order_heads
from bone_fx.lower.symbolic import is_operator, operands
from tests.framed import apply

HEADS, SIZE, TOKENS, WIDTH = 3, 8, 5, 20


class Attention(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.qkv = nn.Linear(WIDTH, HEADS * 3 * SIZE, bias=change != "no bias")

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.qkv(x)
        if self.change == "between":
            y = torch.relu(y)
        y = y.view(*x.shape[:2], HEADS, 3 * SIZE)
        if self.change == "slices":
            parts = [y[..., i * SIZE : (i + 1) * SIZE] for i in range(3)]
        elif self.change == "tokens first":
            parts = list(y.chunk(3, dim=-1))
        else:
            parts = list(y.transpose(1, 2).chunk(3, dim=-1))
        if self.change == "other order":
            parts = [parts[0], parts[2], parts[1]]
        heads_first = parts[0].shape[1] == HEADS
        flat = [(p.transpose(1, 2) if heads_first else p).reshape(*x.shape[:2], -1) for p in parts]
        if self.change == "added":
            flat[1] = flat[1] + 1.0
        return tuple(flat)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        lengths = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        parts = self.projections(x)
        output = group_query_attention(
            *parts,
            (past, past),
            lengths,
            total=TOKENS + 3,
            head_sink=None,
            attributes={"num_heads": HEADS, "kv_num_heads": HEADS, "scale": 0.5},
        )[0]
        return output, *parts


def graph_of(change: str) -> tuple[Attention, GraphModule]:
    torch.manual_seed(0)
    model = Attention(change)
    inputs = torch.zeros(2, TOKENS, WIDTH), torch.zeros(2, HEADS, 3, SIZE)
    return model, torch.export.export(model, inputs).graph_module


def projections_of(model: Attention, gm: GraphModule) -> list[Tensor]:
    """What the operator reads, run as the graph has it."""
    (attention,) = (
        n for n in gm.graph.nodes if is_operator(n, "com.microsoft", "GroupQueryAttention")
    )
    output = gm.graph.output_node()
    output.args = (tuple(operands(attention)[:3]),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    x = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return list(gm(*model.parameters(), x, torch.zeros(2, HEADS, 3, SIZE)))


@pytest.mark.parametrize("change", ["", "no bias", "slices", "tokens first"])
def test_the_weight_is_ordered(change: str) -> None:
    model, graph = graph_of(change)
    result = apply(order_heads, graph)
    assert result.modified
    linear = [n for n in result.graph_module.graph.nodes if "linear" in str(n.target)]
    assert [n.args[1].target for n in linear] == [torch.ops.aten.cat.default]
    assert not apply(order_heads, result.graph_module).modified
    found = projections_of(model, result.graph_module)
    for a, b in zip(found, projections_of(model, graph), strict=True):
        torch.testing.assert_close(a, b)
        assert float(a.detach().abs().max()) > 0.1


@pytest.mark.parametrize("change", ["between", "other order", "added"])
def test_others_stay(change: str) -> None:
    assert not apply(order_heads, graph_of(change)[1]).modified
