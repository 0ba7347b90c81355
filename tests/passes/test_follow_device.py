"""A graph reads the device from a parameter or an input where its trace wrote it down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bone_fx.graphs import copy_graph
from bone_fx.passes.follow_device import follow_device
from tests.elsewhere import call_on_cuda
from tests.framed import modifies


class Positions(nn.Module):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device

    def forward(self, x: Tensor) -> Tensor:
        there = self.device or x.device
        steps = torch.arange(x.shape[1], device=there)
        table = torch.zeros(x.shape[1], device=there).to(x.device, torch.float32)
        return x + steps.to(x.device, torch.float32) + table


def trace(module: nn.Module, device: str = "cpu") -> fx.GraphModule:
    x = torch.randn(2, 5, device=device)
    traced = torch.export.export(module, (x,), strict=False).module(check_guards=False)
    graph: Any = traced.graph
    graph.set_codegen(torch.fx.graph.CodeGen())
    return fx.GraphModule(traced, graph)


def literals(graph: fx.Graph, device: str) -> list[str]:
    """Names of the nodes that have a device as an argument."""
    wanted = torch.device(device)
    return [n.name for n in graph.nodes if wanted in (*n.args, *n.kwargs.values())]


def test_a_graph_runs_where_its_input_is() -> None:
    gm = trace(Positions())
    given = {"x": torch.randn(2, 5)}
    with pytest.raises(Exception, match="cpu"):
        call_on_cuda(gm, given)
    graph = copy_graph(gm.graph)
    assert len(literals(graph, "cpu")) >= 2
    assert modifies(follow_device, graph)
    graph.lint()
    assert not literals(graph, "cpu")
    assert not modifies(follow_device, graph)  # a second time there is nothing to do
    moved = fx.GraphModule(gm, graph)
    (found,) = call_on_cuda(moved, given)
    assert found.device.type == "cuda"
    assert torch.equal(moved(**given)[0], gm(**given)[0])


def test_the_models_choice_of_another_device_stays() -> None:
    graph = copy_graph(trace(Positions("cpu"), device="meta").graph)
    chosen = literals(graph, "cpu")
    assert len(literals(graph, "meta")) >= 1
    assert modifies(follow_device, graph)
    assert not literals(graph, "meta")
    assert literals(graph, "cpu") == chosen
    assert len(chosen) >= 2


def test_a_graph_without_values_stays() -> None:
    graph = fx.symbolic_trace(Positions("cpu")).graph
    before = str(graph)
    assert not modifies(follow_device, graph)
    assert str(graph) == before
