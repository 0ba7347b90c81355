"""Joins the adapted layers that read one x, so that they share what they compute of it.

Before:
    q = bone_fx.adapted_linear(x, Wq, None, [Dq], ['bone'], [], False)
    k = bone_fx.adapted_linear(x, Wk, None, [Dk], ['bone'], [], False)

After:
    joint = bone_fx.adapted_linears(x, [Wq, Wk], [None, None], [Dq, Dk], ['bone', 'bone'],
                                    False, recompute)
    q = joint[0]
    k = joint[1]

Layers with one block of Bone or BAT and no dropout on its branch. Others keep their node, and so
does a layer that is alone with its x. It is for the form in which a graph runs (`lean.form`):
passes over sites would not see these.
"""

from __future__ import annotations

import operator
from collections import defaultdict

from torch.fx import Graph, Node

from bone_fx.dialects.adapted_calls import META, AdaptedArguments
from bone_fx.operators import ADAPTED_LINEAR, ADAPTED_LINEARS, JOINED_METHODS
from bone_fx.passes.frame import Outcome


def join_sites(graph: Graph) -> Outcome:
    """Replace the nodes of sites that share an input by one."""
    groups: dict[tuple[Node, bool, bool, str], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.target is ADAPTED_LINEAR and _joins(arguments := AdaptedArguments.of(node)):
            key = arguments.x, arguments.transposed, arguments.recompute, _layer(node)
            groups[key].append(node)
    shared = [nodes for nodes in groups.values() if len(nodes) > 1]
    for nodes in shared:
        _join(graph, nodes)
    return Outcome(modified=bool(shared))


def _joins(arguments: AdaptedArguments) -> bool:
    constants = [arguments.weight, arguments.bias, *arguments.blocks]
    return (
        len(arguments.blocks) == 1
        and arguments.methods[0] in JOINED_METHODS
        and not arguments.block_inputs
        and all(node is None or node.op == "get_attr" for node in constants)
    )


def _layer(node: Node) -> str:
    """The element of a module list that a node stands in: a group stays within one."""
    entries = (node.meta.get("nn_module_stack") or {}).values()
    numbered = (str(e[0]) for e in entries if str(e[0]).rpartition(".")[2].isdigit())
    return next(numbered, "")


def _join(graph: Graph, nodes: list[Node]) -> None:
    sites = [AdaptedArguments.of(node) for node in nodes]
    with graph.inserting_before(nodes[0]):
        tensors = [
            [None if n is None else graph.node_copy(n) for n in (s.weight, s.bias, s.blocks[0])]
            for s in sites
        ]
        weights, biases, blocks = (list(column) for column in zip(*tensors, strict=True))
        joint = graph.call_function(
            ADAPTED_LINEARS,
            (
                sites[0].x,
                weights,
                biases,
                blocks,
                [s.methods[0] for s in sites],
                sites[0].transposed,
                sites[0].recompute,
            ),
        )
        joint.meta.update({k: v for k, v in nodes[0].meta.items() if k not in (META, "val")})
        for index, node in enumerate(nodes):
            item = graph.call_function(operator.getitem, (joint, index))
            item.meta.update({k: v for k, v in node.meta.items() if k != META})
            node.replace_all_uses_with(item)
    for node in nodes:
        constants = node.all_input_nodes
        graph.erase_node(node)
        for constant in constants:
            if constant.op == "get_attr" and not constant.users:
                graph.erase_node(constant)
