"""Which parameters of the base train beside an adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bone_fx

CONFIG = bone_fx.BoneConfig(r=8, target_modules=["body"], modules_to_save=["head"])
IDS = torch.tensor([3, 7, 1, 10, 3])


class Tied(nn.Module):
    """A head whose weight is the embedding's, defined before or after it."""

    def __init__(self, *, head_first: bool = False, read_as_table: bool = False) -> None:
        super().__init__()
        if head_first:
            self.head = nn.Linear(24, 11)
        self.table = nn.Embedding(11, 24)
        self.body = nn.Linear(24, 24)
        if not head_first:
            self.head = nn.Linear(24, 11)
        self.head.weight = self.table.weight
        self.read_as_table = read_as_table

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.body(self.table(ids))
        if self.read_as_table:
            return hidden @ self.table.weight.t()
        logits: Tensor = self.head(hidden)
        return logits


@pytest.mark.parametrize("head_first", [False, True])
def test_a_tied_head_to_save_trains_apart_from_the_embedding(head_first: bool) -> None:
    model = Tied(head_first=head_first)
    result = bone_fx.insert_adapters(fx.symbolic_trace(model), CONFIG)
    module: Any = result.graph_module
    assert not result.refused
    assert not module.table.weight.requires_grad
    module(IDS).square().sum().backward()
    assert module.head.weight.grad.abs().sum() > 0
    with torch.no_grad():
        module.head.weight.add_(1.0)
    assert torch.equal(module.table.weight, model.table.weight)
    assert not torch.allclose(module(IDS), model(IDS))


def test_both_ends_of_a_tied_weight_stay_one() -> None:
    config = bone_fx.BoneConfig(r=8, target_modules=["body"], modules_to_save=["head", "table"])
    module: Any = bone_fx.insert_adapters(fx.symbolic_trace(Tied()), config).graph_module
    assert module.head.weight is module.table.weight
    assert module.head.weight.requires_grad


@pytest.mark.parametrize("head_first", [False, True])
@pytest.mark.parametrize("read_as_table", [False, True])
def test_a_head_to_save_that_is_read_as_the_embedding_is_refused(
    head_first: bool, read_as_table: bool
) -> None:
    """`torch.export` names a tied weight once."""
    model = Tied(head_first=head_first, read_as_table=read_as_table)
    program = torch.export.export(model, (IDS,))
    result = bone_fx.insert_adapters(program.module(check_guards=False), CONFIG)
    assert [refusal.name for refusal in result.refused] == ["head"]
    assert "table.weight" in result.refused[0].reason
    module: Any = result.graph_module
    assert not module.table.weight.requires_grad
