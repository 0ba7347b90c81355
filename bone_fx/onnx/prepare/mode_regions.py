"""Regions that ran under `no_grad` or a disabled autocast, moved into the graph around them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from bone_fx.onnx.prepare.inlining import inline

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
    inline(region, body.graph, inputs, attributes=f"{body_node.target}.")
