"""A foreign operator is caught after the stage that left it, by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import bone_fx
from bone_fx.errors import PassError
from bone_fx.operators import ADAPTED_LINEAR, HEAD, RMS_NORM
from bone_fx.passes.verifier import LOWERED, TRAINING, Stage, verify


def traced() -> GraphModule:
    class Marked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = torch.onnx.ops.symbolic(
                "com.microsoft::FastGelu", (x,), dtype=x.dtype, shape=x.shape, version=1
            )
            return torch.onnx.ops.symbolic(
                "bone_fx::Present", (kept,), dtype=x.dtype, shape=x.shape, version=1
            )

    return torch.export.export(Marked(), (torch.randn(3, 4),)).graph_module


def with_call(target: object) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node("call_function", target, (x, x), name="seeded"))  # type: ignore[arg-type]
    return graph


@pytest.mark.parametrize("stage", [TRAINING, LOWERED], ids=lambda stage: stage.name)
def test_a_mark_of_a_capture_is_caught(stage: Stage) -> None:
    graph = traced().graph
    mark = graph.output_node().all_input_nodes[0]
    with pytest.raises(PassError, match=f"after {stage.name} .* Present at node {mark.name}"):
        verify(stage, graph)
    mark.replace_all_uses_with(mark.all_input_nodes[0])
    graph.erase_node(mark)
    verify(stage, graph)


@pytest.mark.parametrize(
    ("stage", "target"),
    [(TRAINING, HEAD), (TRAINING, RMS_NORM), (LOWERED, ADAPTED_LINEAR), (LOWERED, HEAD)],
)
def test_an_operator_of_another_stage_is_caught(stage: Stage, target: object) -> None:
    with pytest.raises(PassError, match=f"after {stage.name} .*bone_fx.* at node seeded"):
        verify(stage, with_call(target))


def test_a_called_module_is_caught_after_lowering() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph
    verify(TRAINING, graph)
    with pytest.raises(PassError, match="after lowering"):
        verify(LOWERED, graph)


def test_an_adapted_module_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    config = bone_fx.BoneConfig(r=4, target_modules=["0"])
    adapted = bone_fx.adapt(nn.Sequential(nn.Linear(8, 8)), config, (torch.randn(2, 8),))
    assert adapted.graph.find_nodes(op="call_function", target=ADAPTED_LINEAR)
    stages: list[str] = []
    monkeypatch.setattr(
        "bone_fx.train.adapter_set.verify", lambda stage, graph: stages.append(stage.name)
    )
    with adapted.disable_adapter():
        pass
    assert stages == ["insertion"]
