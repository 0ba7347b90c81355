"""Cuts a layer where backward needs no more of it, so that recomputing it can stop there.

Before:
    ... %z = bone_fx.gate_product(%gate, %up, 'silu')
    %y = bone_fx.adapted_linear(%z, %W, None, [%D], ['bone'], [], False)
    %out = aten.add(%x, %y)

After:
    recomputed:  ... %z = bone_fx.gate_product(%gate, %up, 'silu'); return (%z, %x)
    the rest:    %y = bone_fx.adapted_linear(%z, ...); %out = aten.add(%x, %y)

A frozen product keeps nothing of its input and a Bone layer its shard sums, so running it outside
of what is recomputed costs no memory, and a quarter of a Llama layer is not computed twice.
PyTorch's checkpoint stops early too (`set_checkpoint_early_stop`), but only before an operator of
its own: an autograd function in Python has computed by the time it says what it keeps.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, Node

from bone_fx.dialects.adapted_calls import AdaptedArguments
from bone_fx.operators import ADAPTED_LINEAR, KEEP_SUMS

aten = torch.ops.aten

_KEEP_NOTHING = frozenset({aten.add.Tensor, aten.to.dtype})


def cut_recomputed(graph: Graph, trained: Collection[str] = ()) -> tuple[Graph, Graph] | None:
    """The part of a graph that has to be recomputed, and the rest, which takes what it returns.

    Args:
        graph: Of a layer, in the form that runs; it stays as it was.
        trained: Names of the parameters that train: a product with one of them keeps its input.

    Returns:
        Two graphs; the results of the first are in the order of the second's arguments. None where
        backward needs all of the graph.
    """
    late: set[Node] = set()
    for node in reversed(graph.nodes):
        if _keeps_little(node, trained) and all(u in late or u.op == "output" for u in node.users):
            late.add(node)
    late = {node for node in late if _follows_a_product(node, late)}
    if not late:
        return None
    read = {
        i: None for n in graph.nodes if n in late or n.op == "output" for i in n.all_input_nodes
    }
    handed = [n for n in read if n not in late and n.op != "get_attr"]
    return _part(graph, late, handed), _rest(graph, late, handed)


def _keeps_little(node: Node, trained: Collection[str]) -> bool:
    if node.target is ADAPTED_LINEAR:
        arguments = AdaptedArguments.of(node)
        few = KEEP_SUMS.issuperset(arguments.methods) and not arguments.block_inputs
        return few and _is_frozen(arguments.weight, trained)
    if node.target is aten.linear.default:
        return _is_frozen(node.args[1], trained)
    return node.target in _KEEP_NOTHING


def _is_frozen(weight: Any, trained: Collection[str]) -> bool:
    return isinstance(weight, Node) and weight.op == "get_attr" and weight.target not in trained


def _follows_a_product(node: Node, late: set[Node]) -> bool:
    """Whether there is something to gain from leaving a node out."""
    if node.target is ADAPTED_LINEAR or node.target is aten.linear.default:
        return True
    return any(n in late and _follows_a_product(n, late) for n in node.all_input_nodes)


def _part(graph: Graph, late: set[Node], handed: list[Node]) -> Graph:
    part = Graph(tracer_cls=graph._tracer_cls)
    now: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op != "output" and node not in late:
            now[node] = part.node_copy(node, now.__getitem__)
    part.output(tuple(now[node] for node in handed))
    part.eliminate_dead_code()
    return part


def _rest(graph: Graph, late: set[Node], handed: list[Node]) -> Graph:
    rest = Graph(tracer_cls=graph._tracer_cls)
    now: dict[Node, Any] = {node: rest.placeholder(node.name) for node in handed}
    for node in graph.nodes:
        if node.op == "get_attr" and any(u in late or u.op == "output" for u in node.users):
            now[node] = rest.node_copy(node)
        elif node in late:
            now[node] = rest.node_copy(node, now.__getitem__)
        elif node.op == "output":
            rest.output(torch.fx.map_arg(node.args[0], now.__getitem__))
    return rest
