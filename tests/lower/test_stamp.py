"""A layer that was traced once is copied for each of its equals."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from bone_fx.lower.stamp import DOMAIN, ENTRY, EXIT, LAYER, every_layer_written, stamp
from bone_fx.lower.symbolic import is_operator
from tests.framed import apply

WIDTH = 4


def mark(kind: str, tensors: tuple[Tensor, ...], path: str) -> Tensor:
    first = tensors[0]
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{kind}",
        tensors,
        {"path": path},
        dtype=first.dtype,
        shape=first.shape,
        version=1,
    )


class Layers(nn.Module):
    """Layer 0 between marks, with a mark inside that belongs to no layer; layer 1 as one node."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, ...]:
        shared = one.sum() * 0
        hidden = mark(ENTRY, (x, one, one), "layers.0")
        inner = mark(ENTRY, (hidden, one, one), "layers.0.inner.0")
        hidden = self.layers[0](inner) + shared
        present = one + hidden
        left = mark(EXIT, (hidden, present, present), "layers.0")
        last, key, value = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{LAYER}",
            (left, two, two),
            {"of": "layers.0", "path": "layers.1"},
            dtypes=(x.dtype,) * 3,
            shapes=(x.shape,) * 3,
            version=1,
        )
        return last, present, key, value


def test_copies_the_layer_with_the_other_weight() -> None:
    model = Layers()
    inputs = torch.rand(3, WIDTH), torch.rand(3, WIDTH), torch.rand(3, WIDTH)
    program = torch.export.export(model, inputs)
    graph = program.graph_module
    names = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    }
    layer = every_layer_written(graph.graph)
    assert layer is not None
    assert is_operator(layer, DOMAIN, LAYER)
    result = apply(stamp, graph, names)
    assert result.modified
    assert every_layer_written(result.graph_module.graph) is None
    assert not any(_is_mark(node) for node in result.graph_module.graph.nodes)
    weights = [parameter.detach() for parameter in model.parameters()]
    x, one, two = inputs
    found = _run(result.graph_module, [*weights, x, one, two])
    first = x @ weights[0].t()
    second = first @ weights[1].t()
    expected = (second, one + first, two + second, two + second)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    assert not apply(stamp, result.graph_module, names).modified


def _is_mark(node: Node) -> bool:
    return any(is_operator(node, DOMAIN, kind) for kind in (ENTRY, EXIT, LAYER))


def _run(gm: GraphModule, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.fx.Interpreter(gm).run(*inputs))
