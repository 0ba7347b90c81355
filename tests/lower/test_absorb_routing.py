"""Routing that ONNX Runtime's MoE computes itself becomes its attributes; other routing stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from bone_fx.capture.decoder.ort_operators import routed_experts
from bone_fx.lower.absorb_routing import DOMAIN, ROUTED, absorb_routing
from bone_fx.lower.symbolic import attributes, is_operator, operands
from tests.framed import apply

ATTRIBUTES = {"k": 2, "activation_type": "swiglu", "activation_alpha": 1.0, "swiglu_limit": 7.0}
Routing = Callable[[Tensor], tuple[Tensor, Tensor]]


class Mixture(nn.Module):
    def __init__(self, routing: Routing) -> None:
        super().__init__()
        self.routing = routing
        self.router = nn.Linear(16, 4)
        self.up = nn.Parameter(torch.randn(4, 24, 16))
        self.down = nn.Parameter(torch.randn(4, 16, 12))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.routing(self.router(x))
        experts = (self.up, None), (self.down, None)
        return routed_experts(x, (chosen, weights), *experts, ATTRIBUTES)


def chosen_probabilities(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.topk(torch.softmax(scores, -1, dtype=torch.float), 2, dim=-1)
    return weights.to(scores.dtype), chosen


def divided(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = chosen_probabilities(scores)
    return weights / weights.sum(-1, keepdim=True), chosen


def divided_in_place(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.topk(torch.softmax(scores.float(), dim=-1), 2, dim=-1)
    weights /= weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def softmax_of_chosen(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = torch.topk(scores, 2, dim=-1)
    return torch.softmax(weights, dim=1, dtype=weights.dtype), chosen


def sigmoids(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(torch.sigmoid(scores), 2, dim=-1)


def smallest(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(torch.softmax(scores, -1), 2, dim=-1, largest=False)


def scaled(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = chosen_probabilities(scores)
    return weights * 2.5, chosen


def over_tokens(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.topk(torch.softmax(scores, 0), 2, dim=-1)


def divided_by_all(scores: Tensor) -> tuple[Tensor, Tensor]:
    weights, chosen = chosen_probabilities(scores)
    return weights / weights.sum(0, keepdim=True), chosen


def of_another_choice(scores: Tensor) -> tuple[Tensor, Tensor]:
    return chosen_probabilities(scores * 0.5)[0], chosen_probabilities(scores)[1]


def traced(routing: Routing) -> torch.fx.GraphModule:
    model = Mixture(routing).eval()
    gm = torch.export.export(model, (torch.randn(5, 16),)).graph_module
    for node in gm.graph.find_nodes(
        op="call_function", target=torch.ops.aten._assert_tensor_metadata.default
    ):
        gm.graph.erase_node(node)
    return gm


def experts(gm: torch.fx.GraphModule, domain: str, op_type: str) -> list[Node]:
    return [n for n in gm.graph.nodes if is_operator(n, domain, op_type)]


@pytest.mark.parametrize(
    ("routing", "normalized"),
    [
        (chosen_probabilities, 0),
        (divided, 1),
        (divided_in_place, 1),
        (softmax_of_chosen, 1),
    ],
)
def test_the_operator_routes(routing: Routing, normalized: int) -> None:
    result = apply(absorb_routing, traced(routing))
    assert result.modified
    (mixture,) = experts(result.graph_module, "com.microsoft", "MoE")
    assert attributes(mixture) == {**ATTRIBUTES, "normalize_routing_weights": normalized}
    hidden, scores, up, up_bias, *_ = operands(mixture)
    assert hidden is not None
    assert scores is not None
    assert hidden.name == "x"
    assert scores.target is torch.ops.aten.linear.default
    assert up is not None
    assert up_bias is None
    left = {n.target for n in result.graph_module.graph.nodes}
    assert torch.ops.aten.topk.default not in left
    assert torch.ops.aten.div_.Tensor not in left
    assert not apply(absorb_routing, result.graph_module).modified


@pytest.mark.parametrize(
    "routing", [sigmoids, smallest, scaled, over_tokens, divided_by_all, of_another_choice]
)
def test_other_routing_stays(routing: Routing) -> None:
    gm = traced(routing)
    result = apply(absorb_routing, gm)
    assert not result.modified
    nodes = result.graph_module.graph.nodes
    assert any(is_operator(node, DOMAIN, ROUTED) for node in nodes)
