"""Gives a mixture of experts the scores of its router, from which ONNX Runtime chooses by itself.

Before:
    scores: [N, X] = linear(x, router)
    weights, chosen = topk(softmax(scores), k);  weights = weights / sum(weights)
    RoutedExperts(x [N, H], chosen, weights, …)

After:
    scores: [N, X] = linear(x, router)
    MoE(x [N, H], scores, …) normalize_routing_weights=1

A softmax of the chosen scores is the same as chosen probabilities divided by their sum. Without
that division the attribute is 0. Any other routing keeps its node, which nothing translates: a
capture asks `is_known_routing` first, and writes the experts out where it is not known.

`x` stays flat: where ONNX Runtime 1.31 knows that input and output are of one size, as it does for
[B, S, H], its kernel for the CPU writes over the input while it still reads it.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from bone_fx.lower.symbolic import (
    CONTRIB,
    attributes,
    is_operator,
    operands,
    rewrite,
)
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

DOMAIN, ROUTED = "bone_fx", "RoutedExperts"

_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)
_DIVISIONS = (aten.div.Tensor, aten.div_.Tensor)


def absorb_routing(graph: Graph) -> Outcome:
    """Makes a MoE of every RoutedExperts of which the routing is recognised."""
    changed = 0
    for node in list(graph.nodes):
        if is_operator(node, DOMAIN, ROUTED):
            changed += _absorb(graph, node)
    return Outcome(modified=changed > 0)


def is_known_routing(chosen: Node | None, weights: Node | None) -> bool:
    """Whether a RoutedExperts of these operands would become a MoE."""
    return weights is not None and _routing(chosen, weights) is not None


def _absorb(graph: Graph, node: Node) -> bool:
    hidden, chosen, weights, *constants = operands(node)
    assert hidden is not None
    routing = _routing(chosen, weights)
    if routing is None:
        return False
    scores, normalized, written = routing
    values = {k: v for k, v in attributes(node).items() if isinstance(v, int | float | str)}
    values["normalize_routing_weights"] = int(normalized)
    node.update_arg(1, "MoE")
    node.update_kwarg("domain", CONTRIB)
    rewrite(node, [hidden, scores, *constants], values)
    if written is not None and not written.users:  # in place, so not dead by itself
        graph.erase_node(written)
    return True


def _routing(chosen: Node | None, weights: Node | None) -> tuple[Node, bool, Node | None] | None:
    """The router's scores, whether weights add up to 1, and an in-place division that does it."""
    top = _item(chosen, 1)
    if top is None or not _is_top(top):
        return None
    source = top.args[0]
    assert isinstance(source, Node)
    weights = _uncast(weights)
    if weights.target is aten.softmax.int and _is_last(weights):
        kept = _uncast(weights.args[0])
        return (source, True, None) if _item(kept, 0) is top else None
    if source.target is not aten.softmax.int or not _is_last(source):
        return None
    scores = _uncast(source.args[0])
    if _item(weights, 0) is top:
        return scores, False, None
    if weights.target not in _DIVISIONS or len(weights.args) != 2:
        return None
    share, total = weights.args
    if not isinstance(share, Node) or not _is_sum(total, share):
        return None
    if _item(_uncast(share), 0) is not top:
        return None
    return scores, True, weights if weights.target is aten.div_.Tensor else None


def _item(node: object, place: int) -> Node | None:
    """The node of which this is one output."""
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == place:
        source = node.args[0]
        return source if isinstance(source, Node) else None
    return None


def _uncast(node: object) -> Node:
    assert isinstance(node, Node)
    while node.target in _CASTS:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _is_last(node: Node, place: int = 1) -> bool:
    """Whether an operator works along the last axis."""
    source = node.args[0]
    assert isinstance(source, Node)
    axis = node.args[place] if len(node.args) > place else node.kwargs.get("dim", -1)
    return isinstance(axis, int) and axis % source.meta["val"].dim() == source.meta["val"].dim() - 1


def _is_top(node: Node) -> bool:
    largest = node.args[3] if len(node.args) > 3 else node.kwargs.get("largest", True)
    return node.target is aten.topk.default and largest is True and _is_last(node, 2)


def _is_sum(node: object, of: Node) -> bool:
    if not isinstance(node, Node) or node.target is not aten.sum.dim_IntList:
        return False
    rank = of.meta["val"].dim()
    axes, keep = (*node.args[1:], None, None)[:2]
    keep = node.kwargs.get("keepdim", keep)
    return (
        node.args[0] is of
        and isinstance(axes, list | tuple)
        and [axis % rank for axis in axes if isinstance(axis, int)] == [rank - 1]
        and keep is True
    )
