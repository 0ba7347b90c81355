"""Each row of a running form's table keeps what it says: losses, and gradients of the blocks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, fx

import bone_fx
from bone_fx.graphs import copy_graph
from bone_fx.lean.form import MODEL
from bone_fx.passes.frame import Frame, Keeps, Row
from bone_fx.train.adapted_module import AdaptedModule
from tests.capture.architectures import BY_NAME
from tests.tolerances import assert_agrees

ROW = BY_NAME["llama"]


@functools.cache
def adapted_llama() -> AdaptedModule:
    config = bone_fx.BoneConfig(r=4, target_modules="all-linear")
    adapted = bone_fx.adapt(ROW.build(), config, ROW.inputs(3, 12))
    assert isinstance(adapted, AdaptedModule)
    for name, parameter in adapted.named_parameters():
        if "bone_block" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted


def logits_and_gradients(graph: fx.Graph) -> list[Tensor]:
    adapted = adapted_llama()
    flat = adapted._origin.signature.bind(**ROW.inputs(2, 7))
    logits = fx.GraphModule(adapted, graph)(*flat)[0]
    blocks = [p for p in adapted.parameters() if p.requires_grad]
    return [logits, *torch.autograd.grad(logits.square().mean(), blocks)]


@functools.cache
def expected() -> list[Tensor]:
    return logits_and_gradients(copy_graph(adapted_llama().graph))


@pytest.mark.parametrize("row", MODEL, ids=lambda row: row.run.__name__)
def test_a_row_keeps_what_it_says(row: Row) -> None:
    graph = copy_graph(adapted_llama().graph)
    Frame(graph).run_row(row)
    for one, other in zip(logits_and_gradients(graph), expected(), strict=True):
        if row.keeps is Keeps.BITS:
            assert torch.equal(one, other)
        else:
            assert_agrees(one, other, "gradient")
    again = Frame(graph).run_row(row)
    assert not again.modified
