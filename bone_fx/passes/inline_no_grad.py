"""Puts regions under `torch.no_grad()` in line where no gradient could come out of them anyway.

Before:
    %angles = wrap_with_set_grad_enabled(False, %region, %positions, %inv_freq)
    %cos = getitem(%angles, 0)

After:
    ...; %cos = aten.cos(%phases)

`torch.export` makes an operator of such a region, as models have around their rotary angles, and
`torch.compile` does not take it with a batch of another size. One that reads a parameter, or a
floating value that may depend on one, stays.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from bone_fx.passes.frame import Outcome

_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


def inline_no_grad(gm: GraphModule) -> Outcome:
    """Put regions in line."""
    changed = False
    for node in list(gm.graph.nodes):
        if node.target is not _REGION or node.args[0] is not False:
            continue
        region, inputs = node.args[1], node.args[2:]
        body = gm.get_submodule(str(region.target))
        if not isinstance(body, GraphModule) or not all(_needs_no_grad(gm, i) for i in inputs):
            continue
        if any(user.target is not operator.getitem for user in node.users):
            continue
        _put_in_line(gm, node, body, inputs)
        gm.graph.erase_node(node)
        if not region.users:
            gm.graph.erase_node(region)
            gm.delete_submodule(str(region.target))
        changed = True
    return Outcome(modified=changed)


def _put_in_line(gm: GraphModule, node: Node, body: GraphModule, inputs: tuple[Any, ...]) -> None:
    placeholders = body.graph.find_nodes(op="placeholder")
    values = dict(zip(placeholders, inputs, strict=True))
    with gm.graph.inserting_before(node):
        outputs: Any = gm.graph.graph_copy(body.graph, values)
    for user in list(node.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        gm.graph.erase_node(user)


def _needs_no_grad(gm: GraphModule, value: Any) -> bool:
    """Whether a value is an integer or a buffer."""
    if not isinstance(value, Node):
        return True
    if value.op == "get_attr":
        owner, _, leaf = str(value.target).rpartition(".")
        return leaf in gm.get_submodule(owner)._buffers
    val: Any = value.meta.get("val")
    return isinstance(val, torch.SymInt) or (
        isinstance(val, torch.Tensor) and not (val.is_floating_point() or val.is_complex())
    )
