"""Lets a graph run where its inputs are, instead of where it was traced.

Before (traced on a CPU):
    %n = aten.arange(%length, device=cpu); %m = aten.to.device(%attention_mask, cpu, torch.bool)

After:
    %d = getattr(%input_ids, 'device')
    %n = aten.arange(%length, device=%d);  %m = aten.to.device(%attention_mask, %d, torch.bool)

A trace writes down the device of what a model makes by itself: positions, masks, tables. Parameters
move by `to("cuda")` or by FSDP2, which asks no module; literals would stay. Those of another device
than the inputs' are left: the model chose them. For the form in which a graph runs (`layer_graph`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node


def follow_device(graph: Graph) -> int:
    """Read the device from the first input, in place; how many nodes had it as a literal.

    A graph whose inputs have no values in their `meta` stays as it is.
    """
    given = next((n for n in graph.nodes if n.op == "placeholder" and _is_tensor(n)), None)
    if given is None:
        return 0
    traced_on: torch.device = given.meta["val"].device
    fixed = [n for n in graph.nodes if n.op == "call_function" and _names(n, traced_on)]
    if not fixed:
        return 0
    with graph.inserting_after(given):
        here = graph.call_function(getattr, (given, "device"))

    def follow(value: Any) -> Any:
        return here if _is(value, traced_on) else value

    for node in fixed:
        node.args = tuple(follow(value) for value in node.args)
        node.kwargs = {name: follow(value) for name, value in node.kwargs.items()}
    return len(fixed)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _names(node: Node, device: torch.device) -> bool:
    """Whether a device is an argument of a node."""
    return any(_is(value, device) for value in (*node.args, *node.kwargs.values()))


def _is(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.device) and value == device
