"""Equal layers of a training capture are traced once, and the graph is that of a full trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bone_fx.capture.stamping import plain_layers
from bone_fx.capture.training.capture_training import TrainingCapture, capture_training
from tests.capture.architectures import ARCHITECTURES, CORE, Architecture
from tests.tiers import tiered

LAYERS = (
    *("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers"),
    *("n_layers", "num_decoder_layers"),
)
ALL_TRACED = {"bloom"}
"""Rows whose layers give the probabilities of attention too."""


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that were one node, in order."""
    marked: list[str] = []
    mark = plain_layers.mark

    def listening(kind: str, tensors: Any, path: str, **more: Any) -> Any:
        if kind == plain_layers.LAYER:
            marked.append(path)
        return mark(kind, tensors, path, **more)

    monkeypatch.setattr(plain_layers, "mark", listening)
    return marked


def content(capture: TrainingCapture) -> list[Any]:
    """The graph: targets, arguments by position of the node, and the modules of each.

    Constants of the code and sizes have no position: equal layers share them.
    """
    nodes = [
        node
        for node in capture.graph_module.graph.nodes
        if "lifted_tensor" not in str(node.target)
        and not isinstance(node.meta.get("val"), torch.SymInt)
    ]
    place = {node: number for number, node in enumerate(nodes)}
    return [
        (
            node.op,
            str(node.target),
            str(torch.fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{place.get(n)}")),
            list((node.meta.get("nn_module_stack") or {}).values()),
        )
        for node in nodes
    ]


KINDS = {*CORE, *ALL_TRACED, "gemma3_text", "falcon", "t5"}
"""What the other rows' captures compute is compared with their models elsewhere."""


@pytest.mark.parametrize("row", tiered([r for r in ARCHITECTURES if r.name in KINDS], {"gpt2"}))
def test_the_graph_is_that_of_a_full_trace(row: Architecture, repeated: list[str]) -> None:
    model = row.build(**{field: 4 for field in LAYERS if field in row.config})
    inputs = row.inputs(3, 12)
    once = content(capture_training(model, inputs))
    assert repeated or row.name in ALL_TRACED
    repeated.clear()
    assert content(capture_training(model, inputs, stamp=False)) == once
    assert not repeated


class Layer(nn.Module):
    """A layer; what it does beside its product is an option."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        self.layer_idx, self.kind = number, kind
        self.up = nn.Linear(16, 16)
        if kind == "writes":
            self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(0.5)
        self.seen: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
        """One layer."""
        y = self.up(hidden)
        if self.kind == "number":
            y = y / (self.layer_idx + 1)
        if self.kind == "writes":
            y = self.norm(y)
        if self.kind == "leaves":
            kept.append(y.mean(-1))
        return hidden + self.dropout(y)


class Net(nn.Module):
    """Four equal layers, of which one may run again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([Layer(number, kind) for number in range(4)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All layers."""
        kept: list[torch.Tensor] = []
        for layer in self.layers:
            x = layer(x, kept)
        if self.kind == "again":
            x = self.layers[1](x, kept)
        return (x, *kept)


@pytest.mark.parametrize("kind", ["plain", "number", "writes", "leaves", "again"])
def test_what_a_layer_does_beside_its_output_is_kept(kind: str, repeated: list[str]) -> None:
    torch.manual_seed(0)
    model = Net(kind)
    x = torch.randn(5, 16)
    capture = capture_training(model, [x])
    assert content(capture) == content(capture_training(model, [x], stamp=False))
    assert bool(repeated) == (kind != "number")
    torch.manual_seed(1)
    expected = model.train()(x)
    torch.manual_seed(1)  # every layer draws its own numbers
    actual = capture(x)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
