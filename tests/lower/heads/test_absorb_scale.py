"""A factor of the queries becomes part of the operator's scale where the scores stay the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from bone_fx.capture.decoder.ort_operators import group_query_attention
from bone_fx.lower.heads.absorb_scale import absorb_scale
from bone_fx.lower.symbolic import attributes, is_operator, operands
from tests.framed import apply


class Attention(nn.Module):
    def __init__(self, change: Callable[[Tensor], Tensor], scale: float | None) -> None:
        super().__init__()
        self.change = change
        self.values = {"num_heads": 4, "kv_num_heads": 4}
        self.values |= {} if scale is None else {"scale": scale}  # type: ignore[dict-item]

    def forward(self, x: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        query = self.change(x)
        output = group_query_attention(
            query,
            x,
            x,
            (past, past),
            lengths,
            total=8,
            head_sink=None,
            attributes=self.values,
        )[0]
        return output, past


def graph_of(change: Callable[[Tensor], Tensor], scale: float | None = 0.5) -> GraphModule:
    inputs = torch.zeros(1, 5, 32), torch.zeros(1, 4, 3, 8)
    return torch.export.export(Attention(change, scale), inputs).graph_module


def attention_of(gm: GraphModule) -> torch.fx.Node:
    (node,) = (n for n in gm.graph.nodes if is_operator(n, "com.microsoft", "GroupQueryAttention"))
    return node


def test_the_factor_becomes_part_of_the_scale() -> None:
    graph = graph_of(lambda x: x * 0.25)
    attention = attention_of(apply(absorb_scale, graph).graph_module)
    assert attributes(attention) == {"num_heads": 4, "kv_num_heads": 4, "scale": 0.125}
    query, key, *_ = operands(attention)
    assert query is key
    assert not apply(absorb_scale, apply(absorb_scale, graph).graph_module).modified


def test_two_factors_are_one() -> None:
    graph = apply(absorb_scale, graph_of(lambda x: x * 0.5 * 4)).graph_module
    assert attributes(attention_of(graph))["scale"] == 1.0
    assert not any(n.target is torch.ops.aten.mul.Tensor for n in graph.graph.nodes)


@pytest.mark.parametrize(
    ("change", "scale"),
    [
        (lambda x: x * 0.0, 0.5),
        (lambda x: x * -2.0, 0.5),
        (lambda x: x * x, 0.5),
        (lambda x: x + 0.25, 0.5),
        (lambda x: x * 0.25, None),
    ],
)
def test_others_stay(change: Callable[[Tensor], Tensor], scale: float | None) -> None:
    assert not apply(absorb_scale, graph_of(change, scale)).modified
