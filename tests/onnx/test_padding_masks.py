"""Which masks of attention are taken for padding, and which stay as the model computes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.nn.functional import scaled_dot_product_attention

from bone_fx.onnx.aten.scaled_attention import SDPA
from bone_fx.onnx.prepare.padding_masks import replace_padding_masks

Allowed = Callable[[Tensor, Tensor], Tensor]
"""Positions of queries [S, 1] and keys [T] to what is seen [S, T]."""


class Attention(nn.Module):
    """New tokens that attend to past and new ones, under padding and a mask of their positions."""

    def __init__(self, allowed: Allowed) -> None:
        super().__init__()
        self.allowed = allowed

    def forward(self, q: Tensor, k: Tensor, padding: Tensor) -> Tensor:
        new, total = q.shape[2], padding.shape[1]
        queries = torch.arange(new)[:, None] + (total - new)
        seen = self.allowed(queries, torch.arange(total))
        mask = (padding != 0)[:, None, None, :] & seen
        return scaled_dot_product_attention(q, k, k, attn_mask=mask)


def is_replaced(allowed: Allowed, *, past: int) -> bool:
    """Whether the mask in the graph becomes another one; the outputs stay as they are."""
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4 + past, 8)
    padding = torch.ones(2, 4 + past, dtype=torch.long)
    total = Dim("total", max=5000)
    new = Dim("new", max=5000) if past else total
    batch = Dim("batch")
    shapes = ({0: batch, 2: new}, {0: batch, 2: total}, {0: batch, 1: total})
    module = Attention(allowed)
    graph_module = export(module, (q, k, padding), dynamic_shapes=shapes).graph_module
    (node,) = graph_module.graph.find_nodes(op="call_function", target=SDPA)
    before = node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"]
    replace_padding_masks(graph_module)
    return before is not (node.args[3] if len(node.args) > 3 else node.kwargs["attn_mask"])


@pytest.mark.parametrize("past", [0, 9])
def test_padding_alone_is_replaced(past: int) -> None:
    assert is_replaced(lambda queries, keys: (keys >= 0) & (queries == queries), past=past)


@pytest.mark.parametrize("past", [0, 9, 40])
def test_a_causal_mask_stays_behind_any_past(past: int) -> None:
    """Behind a long past one new token sees all: a mask of that size alone says nothing."""
    assert not is_replaced(lambda queries, keys: keys <= queries, past=past)


@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("size", [3, 8, 64, 300, 900])
def test_a_window_stays_whatever_its_size(size: int, past: int) -> None:
    assert not is_replaced(lambda queries, keys: (keys - queries).abs() <= size, past=past)
    assert not is_replaced(lambda queries, keys: keys // size == queries // size, past=past)
    assert not is_replaced(lambda queries, keys: 2 * (keys - queries).abs() < size + 0.5, past=past)


def test_blocks_of_a_size_stay() -> None:
    def allowed(queries: Tensor, keys: Tensor) -> Tensor:
        return (keys // 16 - queries // 16).abs() <= 5

    assert not is_replaced(allowed, past=0)


def test_a_mask_whose_window_would_be_too_long_to_try_stays() -> None:
    assert not is_replaced(lambda queries, keys: (keys - queries).abs() <= 4000, past=0)
