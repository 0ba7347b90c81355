"""q, k and v that norms keep apart are computed by one product, and split."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import group_query_attention
from bone_fx.lower.heads.pack_projections import pack_projections
from bone_fx.lower.symbolic import is_operator, operands
from tests.framed import apply

HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 8, 5
WIDTH = HEADS * SIZE
LINEAR, SPLIT = torch.ops.aten.linear.default, torch.ops.aten.split_with_sizes.default


class Attention(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=change == "biases")
        self.k = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=change == "biases")
        self.v = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=change == "biases")
        self.norm = nn.LayerNorm(SIZE)

    def heads(self, x: Tensor) -> Tensor:
        if self.change == "between":
            x = torch.relu(x)
        split = self.norm(x.view(1, TOKENS, -1, SIZE).transpose(1, 2))
        return split.transpose(1, 2).reshape(1, TOKENS, -1)

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, ...]:
        lengths = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        key = self.k(x * 2 if self.change == "other input" else x)
        output = group_query_attention(
            self.heads(self.q(x)),
            self.heads(key),
            key if self.change == "keys as values" else self.v(x),
            (past, past),
            lengths,
            total=TOKENS + 3,
            head_sink=None,
            attributes={"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.5},
        )[0]
        return output, (key + 1.0 if self.change == "read elsewhere" else x)


def graph_of(change: str) -> tuple[Attention, GraphModule]:
    torch.manual_seed(0)
    model = Attention(change)
    inputs = torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, KV_HEADS, 3, SIZE)
    return model, torch.export.export(model, inputs).graph_module


def attention_inputs(model: Attention, gm: GraphModule) -> list[Tensor]:
    (attention,) = (
        n for n in gm.graph.nodes if is_operator(n, "com.microsoft", "GroupQueryAttention")
    )
    gm.graph.output_node().args = (tuple(operands(attention)[:3]),)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    return list(gm(*model.parameters(), x, torch.zeros(1, KV_HEADS, 3, SIZE)))


@pytest.mark.parametrize("change", ["", "biases"])
def test_one_product(change: str) -> None:
    model, graph = graph_of(change)
    result = apply(pack_projections, graph)
    targets = [node.target for node in result.graph_module.graph.nodes]
    assert (targets.count(LINEAR), targets.count(SPLIT)) == (1, 1)
    assert not apply(pack_projections, result.graph_module).modified
    found = attention_inputs(model, result.graph_module)
    for a, b in zip(found, attention_inputs(model, graph), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("change", ["between", "other input", "keys as values", "read elsewhere"])
def test_others_stay(change: str) -> None:
    assert not apply(pack_projections, graph_of(change)[1]).modified
