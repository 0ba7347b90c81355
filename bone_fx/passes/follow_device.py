"""Lets a graph run where its parameters are, instead of where it was traced.

Before (traced on a CPU):
    %n = aten.arange(%length, device=cpu); %m = aten.to.device(%attention_mask, cpu, torch.bool)

After:
    %d = getattr(%embed_tokens_weight, 'device')
    %n = aten.arange(%length, device=%d);  %m = aten.to.device(%attention_mask, %d, torch.bool)

A trace writes down the device of what a model makes by itself: positions, masks, tables. Parameters
move by `to("cuda")` or by FSDP2, which asks no module; literals would stay. Those of another device
than the parameters' are left: the model chose them. For the form in which a graph runs
(`lean.form`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bone_fx.graphs import erase_unread
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

_TAKE_CPU_TENSORS = frozenset(
    {aten._pack_padded_sequence.default, aten.tensor_split.tensor_indices_or_sections}
)
"""Operators with an argument that must be on the CPU: what was moved there for them stays."""

_AUTOCAST = torch.ops.higher_order.wrap_with_autocast
"""Its first argument is the kind of device, as a string."""


def follow_device(graph: Graph) -> Outcome:
    """Read the device from a parameter, or else from an input.

    A graph in which neither has a value in its `meta` stays as it is.
    """
    anchor = _known(graph)
    if anchor is None:
        return Outcome(modified=False)
    traced_on: torch.device = anchor.meta["val"].device
    fixed = [n for n in graph.nodes if n.op == "call_function" and _is_fixed(n, traced_on)]
    if not fixed:
        return Outcome(modified=False)
    with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
        tensor = anchor if anchor.op == "placeholder" else graph.get_attr(str(anchor.target))
        here = graph.call_function(getattr, (tensor, "device"))
        kind = graph.call_function(getattr, (here, "type"))
    for node in fixed:
        if node.target is _AUTOCAST:
            node.update_arg(0, kind)
            continue
        node.args = tuple(here if _is(value, traced_on) else value for value in node.args)
        node.kwargs = {
            name: here if _is(value, traced_on) else value for name, value in node.kwargs.items()
        }
    erase_unread(graph, kind)
    return Outcome(modified=True)


def _known(graph: Graph) -> Node | None:
    """A parameter on the device that most are on, or else an input."""
    tensors = [n for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    for op in ("get_attr", "placeholder"):
        by_device: dict[torch.device, list[Node]] = {}
        for node in tensors:
            if node.op == op:
                by_device.setdefault(node.meta["val"].device, []).append(node)
        if by_device:
            return max(by_device.values(), key=len)[0]
    return None


def _is_fixed(node: Node, device: torch.device) -> bool:
    """Whether a node has a device as an argument that it could be read for."""
    if node.target is _AUTOCAST:
        return bool(node.args[0] == device.type)
    if _is_wanted_on_cpu(node):
        return False
    return any(_is(value, device) for value in (*node.args, *node.kwargs.values()))


def _is_wanted_on_cpu(node: Node) -> bool:
    """Whether an operator takes it on the CPU only, as it is or cast."""
    return any(
        user.target in _TAKE_CPU_TENSORS
        or (getattr(user.target, "overloadpacket", None) is aten.to and _is_wanted_on_cpu(user))
        for user in node.users
    )


def _is(value: Any, device: torch.device) -> bool:
    return isinstance(value, torch.device) and value == device
