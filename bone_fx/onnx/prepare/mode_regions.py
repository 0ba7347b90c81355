"""Regions that ran under `no_grad` or a disabled autocast, moved into the graph around them."""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_mode_regions(graph_module: GraphModule) -> None:
    """Replaces a region by its nodes, whatever its depth.

    A region with autocast on is left: its casts are not in it.

    Before: `region = wrap_with_set_grad_enabled(False, submodule, x); cos = region[0]`
    After:  `cos = aten.cos(x)`
    """
    while regions := [node for node in graph_module.graph.nodes if _is_plain_region(node)]:
        for region in regions:
            _inline(graph_module, region)
    graph_module.graph.eliminate_dead_code()


def _is_plain_region(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is _SET_GRAD:
        return True
    return node.target is _AUTOCAST and not node.args[2]


def _inline(graph_module: GraphModule, region: Node) -> None:
    place = 1 if region.target is _SET_GRAD else 4
    body_node, *inputs = region.args[place:]
    assert isinstance(body_node, Node)
    assert isinstance(body_node.target, str)
    body = graph_module.get_submodule(body_node.target)
    assert isinstance(body, GraphModule)
    graph = graph_module.graph
    with graph.inserting_before(region):
        copies: dict[Node, Node] = dict(
            zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True)  # type: ignore[arg-type]
        )
        for node in body.graph.nodes:
            if node.op == "get_attr":
                path = f"{body_node.target}.{node.target}"
                copies[node] = graph.get_attr(path)
                copies[node].meta = dict(node.meta)
            elif node.op not in ("placeholder", "output"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
    outputs = torch.fx.map_arg(body.graph.output_node().args[0], copies.__getitem__)
    for user in list(region.users):
        if user.target is operator.getitem:
            assert isinstance(outputs, (list, tuple))
            assert isinstance(user.args[1], int)
            replacement = outputs[user.args[1]]
            assert isinstance(replacement, Node)
            user.replace_all_uses_with(replacement)
            graph.erase_node(user)
    if region.users:
        assert isinstance(outputs, Node)
        region.replace_all_uses_with(outputs)
    graph.erase_node(region)
