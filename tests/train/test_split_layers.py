"""Splitting a training graph into its layers: the same model, one submodule a layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bone_fx.capture.training.capture_training import capture_training
from bone_fx.graphs import copy_module
from bone_fx.train.split_layers import layers_of, split_in_place
from tests.capture.architectures import ARCHITECTURES, Architecture
from tests.captures import capture_once
from tests.tiers import tiered

ROWS = [row for row in ARCHITECTURES if row.name in ("llama", "gpt2", "t5")]


def _losses(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    outputs = [t for t in pytree.tree_leaves(gm(*inputs)) if t.is_floating_point()]
    loss = sum(t.square().mean() for t in outputs)
    assert isinstance(loss, Tensor)
    named = {name: p for name, p in gm.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(named, found, strict=True) if g is not None}


@pytest.mark.parametrize("row", tiered(ROWS, {"llama", "gpt2"}))
def test_split_and_recomputed_layers_are_the_model(row: Architecture) -> None:
    capture = capture_once(row.build(), row.inputs(3, 12))
    graph = capture.graph_module
    inputs = capture.signature.bind(**row.inputs(2, 7))
    loss, gradients = _losses(graph, inputs)

    split = copy_module(graph)
    split_in_place(split)
    assert len(layers_of(split)) >= 2
    assert list(split.state_dict()) == list(graph.state_dict())
    tied = [list(g.named_parameters(remove_duplicate=True)) for g in (graph, split)]
    assert [n for n, _ in tied[0]] == [n for n, _ in tied[1]]
    for checkpointing in (None, {}):
        for layer in layers_of(split).values():
            layer.checkpointing = checkpointing
            assert layer.recomputable
        again, regained = _losses(split, inputs)
        assert torch.equal(again, loss)
        assert regained.keys() == gradients.keys()
        assert all(
            torch.allclose(regained[n], g, rtol=1e-6, atol=1e-9) for n, g in gradients.items()
        )

    before = list(split.graph.nodes)
    split_in_place(split)
    assert [n.name for n in split.graph.nodes] == [n.name for n in before]


def test_a_layer_owns_its_parameters_and_they_stay_the_same_objects() -> None:
    row = ROWS[0]
    graph = copy_module(capture_once(row.build(), row.inputs(3, 12)).graph_module)
    before = dict(graph.named_parameters(remove_duplicate=False))
    split_in_place(graph)
    after = dict(graph.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    layers = layers_of(graph)
    assert [*layers] == ["model.layers.0", "model.layers.1"]
    assert "self_attn.q_proj.weight" in dict(layers["model.layers.0"].named_parameters())
    assert not any("layers" in str(n.target) for n in graph.graph.nodes if n.op == "get_attr")


class Stack(nn.Module):
    """Two layers; `again` runs the first twice."""

    def __init__(self, kind: type[nn.Module], *, again: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), kind(6)) for _ in range(2))
        self.order = [0, 1, 0] if again else [0, 1]

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            x = torch.tanh(self.layers[index](x))
        return x


def test_a_module_that_is_called_twice_stays_as_it_is() -> None:
    torch.manual_seed(0)
    graph = capture_training(Stack(nn.LayerNorm, again=True), (torch.randn(4, 6),)).graph_module
    split = copy_module(graph)
    split_in_place(split)
    assert [*layers_of(split)] == ["layers.1"]
    x = torch.randn(4, 6)
    assert torch.equal(pytree.tree_leaves(split(x))[0], pytree.tree_leaves(graph(x))[0])


def test_running_statistics_are_not_written_twice() -> None:
    torch.manual_seed(0)
    graph = capture_training(Stack(nn.BatchNorm1d), (torch.randn(4, 6),)).graph_module
    split = copy_module(graph)
    split_in_place(split)
    for layer in layers_of(split).values():
        layer.checkpointing = {}
    pytree.tree_leaves(split(torch.randn(4, 6)))[0].sum().backward()
    assert int(split.get_buffer("layers.0.1.num_batches_tracked")) == 1
    assert not any(layer.recomputable for layer in layers_of(split).values())
