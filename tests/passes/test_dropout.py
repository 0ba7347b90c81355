"""Switching dropout in a captured graph: exact, idempotent, also in copies and in subgraphs."""

from __future__ import annotations

import copy
import operator
import warnings

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.graph import CodeGen

from bone_fx.passes.dropout import remember_training, set_dropout


class _Layers(torch.nn.Module):
    """Every operator that reads the mode, and two dropouts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.25)
        self.alpha = torch.nn.AlphaDropout(0.1)
        self.norm = torch.nn.BatchNorm1d(8)
        self.lstm = torch.nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.alpha(self.dropout(x)) + torch.nn.functional.dropout(x, 0.5, training=False)
        x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = torch.nn.functional.scaled_dot_product_attention(
            x, x, x, dropout_p=0.3 if self.training else 0.0
        )
        x = torch.nn.functional.rrelu(x, training=self.training)
        return self.lstm(x)[0]


def _captured() -> tuple[_Layers, GraphModule]:
    torch.manual_seed(0)
    model = _Layers().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's LSTM keeps its weights in a list
        program = torch.export.export(model, (torch.randn(2, 5, 8),), strict=False)
    module = program.module(check_guards=False)
    module.graph.set_codegen(CodeGen())
    return model, GraphModule(module, module.graph)


def _literals(graph_module: GraphModule) -> list[object]:
    return [(node.target, node.args, node.kwargs) for node in graph_module.graph.nodes]


def test_evaluation_equals_eager_and_training_comes_back_exactly() -> None:
    model, graph_module = _captured()
    x = torch.randn(2, 5, 8)
    before = _literals(graph_module)
    assert set_dropout(graph_module, False)
    tracked = model.norm.num_batches_tracked.item()
    model.eval()
    torch.testing.assert_close(graph_module(x)[0], model(x), rtol=0, atol=0)
    assert model.norm.num_batches_tracked.item() == tracked
    assert set_dropout(graph_module, True)
    assert str(_literals(graph_module)) == str(before)
    model.train()
    torch.manual_seed(5)
    twin = copy.deepcopy(model)
    ours = graph_module(x)[0]
    torch.manual_seed(5)
    torch.testing.assert_close(ours, twin(x), rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_idempotent(training: bool) -> None:
    _, graph_module = _captured()
    assert set_dropout(graph_module, training) is not training
    code = graph_module.code
    assert not set_dropout(graph_module, training)
    assert graph_module.code == code


def test_copy_made_in_evaluation_goes_back_to_training() -> None:
    _, graph_module = _captured()
    before = str(_literals(graph_module))
    remember_training(graph_module)
    set_dropout(graph_module, False)
    copied = copy.deepcopy(graph_module)
    assert set_dropout(copied, True)
    assert str(_literals(copied)) == before
    assert str(_literals(graph_module)) != before


def test_subgraphs_are_switched() -> None:
    inner = Graph()
    x = inner.placeholder("x")
    inner.output((inner.call_function(torch.ops.aten.dropout.default, (x, 0.5, True)),))
    root = torch.nn.Module()
    root.inner = GraphModule(torch.nn.Module(), inner)
    outer = Graph()
    x = outer.placeholder("x")
    body = outer.get_attr("inner")
    call = outer.call_function(torch.ops.higher_order.wrap_with_set_grad_enabled, (False, body, x))
    outer.output(outer.call_function(operator.getitem, (call, 0)))
    graph_module = GraphModule(root, outer)
    ones = torch.ones(100)
    assert set_dropout(graph_module, False)
    assert torch.equal(graph_module(ones), ones)
    assert set_dropout(graph_module, True)
    assert not torch.equal(graph_module(ones), ones)


def test_graph_without_dropout_is_not_touched() -> None:
    graph_module = torch.fx.symbolic_trace(torch.nn.Linear(3, 2))
    assert not set_dropout(graph_module, False)
