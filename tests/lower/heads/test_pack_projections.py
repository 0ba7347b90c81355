"""q, k and v become one product where the attention operator may read it."""

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
QKV = (HEADS + 2 * KV_HEADS) * SIZE


class Attention(nn.Module):
    def __init__(self, change: str) -> None:
        super().__init__()
        self.change = change
        bias = change == "biases"
        self.q = nn.Linear(WIDTH, HEADS * SIZE, bias=bias or change == "one bias")
        self.k = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=bias)
        self.v = nn.Linear(WIDTH, KV_HEADS * SIZE, bias=bias)
        self.qkv = nn.Linear(WIDTH, QKV)

    def projections(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
        if self.change == "split":
            return tuple(self.qkv(x).split(sizes, dim=-1))
        if self.change == "slices":
            y = self.qkv(x)
            return y[..., : sizes[0]], y[..., sizes[0] : -sizes[2]], y[..., -sizes[2] :]
        if self.change == "other order":
            q, k, v = self.qkv(x).split(sizes, dim=-1)
            return q, v, k
        other = x * 2 if self.change == "other input" else x
        key = self.k(x) * 2 if self.change == "between" else self.k(x)
        return self.q(x), key, self.v(other)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        lengths = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        return group_query_attention(
            *self.projections(x),
            (past, past),
            lengths,
            total=TOKENS + 3,
            head_sink=None,
            attributes={"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.5},
        )[0]


def graph_of(change: str) -> GraphModule:
    inputs = torch.zeros(1, TOKENS, WIDTH), torch.zeros(1, KV_HEADS, 3, SIZE)
    return torch.export.export(Attention(change), inputs).graph_module


def attention_of(gm: GraphModule) -> torch.fx.Node:
    (node,) = (n for n in gm.graph.nodes if is_operator(n, "com.microsoft", "GroupQueryAttention"))
    return node


@pytest.mark.parametrize(
    ("change", "concatenations"), [("", 1), ("biases", 2), ("split", 0), ("slices", 0)]
)
def test_packs(change: str, concatenations: int) -> None:
    result = apply(pack_projections, graph_of(change))
    nodes = list(result.graph_module.graph.nodes)
    packed, key, value, *rest = operands(attention_of(result.graph_module))
    assert (key, value) == (None, None)
    assert all(node is not None for node in rest)
    assert packed is not None
    assert packed.target is torch.ops.aten.linear.default
    assert packed.meta["val"].shape == (1, TOKENS, QKV)
    assert sum(n.target is torch.ops.aten.cat.default for n in nodes) == concatenations
    assert sum(n.target is torch.ops.aten.linear.default for n in nodes) == 1
    assert not apply(pack_projections, result.graph_module).modified


@pytest.mark.parametrize("change", ["one bias", "other input", "between", "other order"])
def test_leaves_what_cannot_be_one_product(change: str) -> None:
    assert not apply(pack_projections, graph_of(change)).modified
