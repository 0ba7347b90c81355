"""What the frame holds a pass to, alone and one after another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, symbolic_trace

from bone_fx.errors import PassError
from bone_fx.passes.frame import (
    HISTORY,
    PassResult,
    copy_module,
    graph_pass,
    one_after_another,
)


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 1)


def _swapped(gm: GraphModule, old: object, new: object, *, honest: bool = True) -> PassResult:
    copied = copy_module(gm)
    found = [node for node in copied.graph.nodes if node.target is old]
    for node in found:
        node.target = new
    changed = bool(found)
    return PassResult(copied if changed else gm, modified=changed == honest)


@graph_pass
def relu_to_tanh(gm: GraphModule) -> PassResult:
    return _swapped(gm, torch.relu, torch.tanh)


@graph_pass
def tanh_to_sin(gm: GraphModule) -> PassResult:
    return _swapped(gm, torch.tanh, torch.sin)


@graph_pass
def liar(gm: GraphModule) -> PassResult:
    return _swapped(gm, torch.tanh, torch.sin, honest=False)


@graph_pass
def vandal(gm: GraphModule) -> PassResult:
    gm.graph.erase_node(gm.graph.create_node("call_function", torch.sin, ()))
    for node in gm.graph.nodes:
        if node.target is torch.relu:
            node.target = torch.tanh
    return PassResult(gm, modified=True)


def test_a_pass_leaves_its_input_and_compiles_its_result() -> None:
    traced, x = symbolic_trace(Sum()), torch.randn(3)
    result = relu_to_tanh(traced)
    assert torch.equal(traced(x), torch.relu(x + 1))
    assert torch.equal(result.graph_module(x), torch.tanh(x + 1))
    assert result.graph_module.meta[HISTORY] == ["relu_to_tanh"]


def test_passes_one_after_another_work_on_one_copy() -> None:
    traced, x = symbolic_trace(Sum()), torch.randn(3)
    with one_after_another():
        first = relu_to_tanh(traced).graph_module
        second = tanh_to_sin(first).graph_module
        same = tanh_to_sin(second)
    assert first is not traced
    assert second is first
    assert same.graph_module is second
    assert not same.modified
    second.recompile()
    assert torch.equal(second(x), torch.sin(x + 1))
    assert torch.equal(traced(x), torch.relu(x + 1))
    assert second.meta[HISTORY] == ["relu_to_tanh", "tanh_to_sin", "tanh_to_sin"]


def test_what_is_dead_is_no_change_of_the_pass_that_removes_it() -> None:
    traced = symbolic_trace(Sum())
    with one_after_another():
        made = relu_to_tanh(traced).graph_module
        with made.graph.inserting_before(made.graph.output_node()):
            made.graph.call_function(torch.sin, (next(iter(made.graph.nodes)),))
        assert not relu_to_tanh(made).modified
    assert all(node.target is not torch.sin for node in made.graph.nodes)


def test_a_wrong_answer_is_caught_alone_and_in_a_chain() -> None:
    traced = symbolic_trace(Sum())
    with pytest.raises(PassError, match="answered modified=False"):
        liar(relu_to_tanh(traced).graph_module)
    with one_after_another(), pytest.raises(PassError, match="answered modified=False"):
        liar(relu_to_tanh(traced).graph_module)


def test_an_edited_input_is_caught() -> None:
    with pytest.raises(PassError, match="edited the graph it was given"):
        vandal(symbolic_trace(Sum()))
    with one_after_another(), pytest.raises(PassError, match="edited the graph it was given"):
        vandal(symbolic_trace(Sum()))
