"""A rotary embedding moves into the attention that can do it, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import group_query_attention, rotary_embedding
from bone_fx.lower.heads.absorb_rotary import absorb_rotary
from bone_fx.lower.symbolic import attributes, is_operator, operands
from tests.framed import apply

HEADS, SIZE, TOKENS = 2, 32, 5


class Attention(nn.Module):
    def __init__(self, width: int, *, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.width = width
        self.register_buffer("cos", torch.rand(9, width // 2))
        self.register_buffer("sin", torch.rand(9, width // 2))

    def turned(self, x: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        heads = x.view(1, TOKENS, HEADS, SIZE).transpose(1, 2)
        if self.change == "slices":
            part, rest = heads[..., : self.width], heads[..., self.width :]
            heads = torch.cat(
                (rotary_embedding(part, positions, *tables, interleaved=False), rest), -1
            )
        else:
            heads = rotary_embedding(heads, positions, *tables, interleaved=False)
        if self.change == "norm":
            heads = heads * 2.0
        return heads.transpose(1, 2).reshape(1, TOKENS, HEADS * SIZE)

    def forward(self, q: Tensor, k: Tensor, past: Tensor, positions: Tensor) -> Tensor:
        tables = self.cos, self.sin
        other = (self.sin, self.cos) if self.change == "tables" else tables
        lengths = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        return group_query_attention(
            self.turned(q, positions, tables),
            self.turned(k, positions, other),
            k,
            (past, past),
            lengths,
            total=TOKENS,
            head_sink=None,
            attributes={"num_heads": HEADS, "kv_num_heads": HEADS, "scale": 0.5},
        )[0]


def graph_of(module: nn.Module) -> GraphModule:
    x = torch.zeros(1, TOKENS, HEADS * SIZE)
    inputs = x, x, torch.zeros(1, HEADS, 3, SIZE), torch.zeros(1, TOKENS, dtype=torch.long)
    return torch.export.export(module, inputs).graph_module


@pytest.mark.parametrize(
    ("width", "change", "absorbed"),
    [
        (32, "", True),
        (16, "slices", True),
        (16, "", True),
        (8, "", False),
        (8, "slices", False),
        (32, "norm", False),
        (32, "tables", False),
    ],
)
def test_absorbs_where_the_operator_does_the_same(
    width: int, change: str, *, absorbed: bool
) -> None:
    result = apply(absorb_rotary, graph_of(Attention(width, change=change)))
    nodes = list(result.graph_module.graph.nodes)
    (attention,) = (n for n in nodes if is_operator(n, "com.microsoft", "GroupQueryAttention"))
    rotary = [n for n in nodes if is_operator(n, "com.microsoft", "RotaryEmbedding")]
    values = attributes(attention)
    assert values["scale"] == 0.5
    assert values.get("do_rotary", 0) == int(absorbed)
    assert len(rotary) == (0 if absorbed else 2)
    if absorbed:
        tables = [str(n.target) for n in operands(attention)[7:9] if n is not None]
        assert tables == ["b_cos", "b_sin"]
    elif change == "slices":
        assert all(attributes(n)["rotary_embedding_dim"] == width for n in rotary)
        assert all(list(n.meta["val"].shape) == [1, HEADS, TOKENS, SIZE] for n in rotary)
    assert not apply(absorb_rotary, result.graph_module).modified
