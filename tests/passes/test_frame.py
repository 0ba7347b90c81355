"""What the frame holds a pass to, alone and in a table."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, symbolic_trace

from bone_fx.errors import PassError
from bone_fx.passes.frame import HISTORY, Frame, Keeps, Outcome, Row, on_a_copy
from bone_fx.sites import Refusal


class Sum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + 1)


def _swapped(graph: Graph, old: object, new: object) -> bool:
    found = graph.find_nodes(op="call_function", target=old)
    for node in found:
        node.target = new
    return bool(found)


def relu_to_tanh(graph: Graph) -> Outcome:
    return Outcome(_swapped(graph, torch.relu, torch.tanh), refused=(Refusal("x", "why not"),))


def tanh_to_sin(graph: Graph) -> Outcome:
    return Outcome(_swapped(graph, torch.tanh, torch.sin))


def liar(graph: Graph) -> Outcome:
    return Outcome(not _swapped(graph, torch.tanh, torch.sin))


def vandal(graph: Graph) -> Outcome:
    first = next(iter(graph.nodes))
    graph.output_node().append(graph.call_function(torch.sin, (first,)))
    graph.output_node().args = (list(graph.nodes)[-1],)
    return Outcome(modified=True)


def stumbler(graph: Graph) -> Outcome:
    raise ValueError("over its own feet")


def complainer(graph: Graph) -> Outcome:
    raise PassError("no such constant")


@on_a_copy
def verb(gm: GraphModule, *, old: object = torch.relu) -> Outcome:
    return Outcome(_swapped(gm.graph, old, torch.tanh))


def no_tanh(graph: Graph) -> Node | None:
    return next((node for node in graph.nodes if node.target is torch.tanh), None)


def test_a_verb_leaves_its_input_and_compiles_its_result() -> None:
    traced, x = symbolic_trace(Sum()), torch.randn(3)
    result = verb(traced)
    assert result.modified
    assert torch.equal(traced(x), torch.relu(x + 1))
    assert torch.equal(result.graph_module(x), torch.tanh(x + 1))
    assert result.graph_module.meta[HISTORY] == ["verb"]
    assert HISTORY not in traced.meta
    again = verb(result.graph_module)
    assert not again.modified
    assert again.graph_module is not result.graph_module
    assert again.graph_module.meta[HISTORY] == ["verb", "verb"]


def test_a_table_edits_the_graph_it_is_given() -> None:
    traced, x = symbolic_trace(Sum()), torch.randn(3)
    rows = [Row(relu_to_tanh, Keeps.MATHEMATICS), Row(tanh_to_sin, Keeps.MATHEMATICS)]
    outcome = Frame(traced.graph).run_table(rows)
    assert outcome.modified
    assert outcome.refused == (Refusal("x", "why not"),)
    traced.recompile()
    assert torch.equal(traced(x), torch.sin(x + 1))
    assert not Frame(traced.graph).run_table(rows).modified
    assert traced.meta[HISTORY] == ["relu_to_tanh", "tanh_to_sin"] * 2


def test_what_is_dead_is_no_change_of_the_pass_that_meets_it() -> None:
    graph = symbolic_trace(Sum()).graph
    with graph.inserting_before(graph.output_node()):
        graph.call_function(torch.sin, (next(iter(graph.nodes)),))
    assert not Frame(graph, sweep=True).run(tanh_to_sin).modified
    assert all(node.target is not torch.sin for node in graph.nodes)


@pytest.mark.parametrize("first", [relu_to_tanh, tanh_to_sin])
def test_a_wrong_answer_is_caught(first: object) -> None:
    frame = Frame(symbolic_trace(Sum()).graph)
    frame.run(first)  # type: ignore[arg-type]
    (name,) = frame.history
    with pytest.raises(PassError, match=f"(?s)pass liar answered modified=.*before it: {name}"):
        frame.run(liar)


@pytest.mark.parametrize(
    ("run", "why"),
    [(vandal, "before being defined|before it"), (stumbler, "over its"), (complainer, "constant")],
)
def test_an_error_names_the_pass_and_those_before(run: object, why: str) -> None:
    frame = Frame(symbolic_trace(Sum()).graph)
    frame.run(tanh_to_sin)
    name = run.__name__  # type: ignore[attr-defined]
    with pytest.raises(PassError, match=f"(?s)pass {name} failed.*{why}") as caught:
        frame.run(run)  # type: ignore[arg-type]
    assert caught.value.found == "passes before it: tanh_to_sin"


def test_a_row_whose_requirement_does_not_hold_is_left_out() -> None:
    graph = symbolic_trace(Sum()).graph
    frame, row = Frame(graph), Row(tanh_to_sin, Keeps.MATHEMATICS, requires=(no_tanh,))
    assert frame.run_row(row) == Outcome(modified=False)
    frame.run(relu_to_tanh)
    outcome = frame.run_table([row, Row(liar, Keeps.BITS, requires=(no_tanh,))])
    assert not outcome.modified
    assert [refusal.name for refusal in outcome.refused] == ["tanh_to_sin", "liar"]
    reason = outcome.refused[0].reason
    assert "no_tanh" in reason
    assert "and relu is" in reason
    assert "tanh_to_sin, relu_to_tanh" in reason
    assert no_tanh(graph) is not None


def test_the_log_says_which_operators_came_and_went(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="bone_fx.passes.frame"):
        Frame(symbolic_trace(Sum()).graph).run(relu_to_tanh)
    assert "pass relu_to_tanh: -1" in caplog.text
    assert "tanh" in caplog.text
