"""Writes additions and the like in place of a tensor that nobody else reads as plain ones.

Before:
    product: [B, S, O] = linear(x, w)
    sum:     [B, S, O] = add_(product, y)

After:
    product: [B, S, O] = linear(x, w)
    sum:     [B, S, O] = add(product, y)

Only where the changed tensor is new, not a view of another, and has no other reader: then nothing
can tell. What else changes tensors in place stays.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.passes.frame import Outcome


def functionalize(graph: Graph) -> Outcome:
    """Replaces operators that change a tensor of their own in place."""
    changed = False
    for node in graph.nodes:
        plain = _counterpart(node)
        if plain is not None:
            node.target = plain
            changed = True
    return Outcome(modified=changed)


def no_mutable_operators(graph: Graph) -> Node | None:
    """Requires that nothing changes a tensor in place; gives the first node that does."""
    return next((node for node in graph.nodes if _is_mutable(node)), None)


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _counterpart(node: Node) -> torch._ops.OpOverload | None:
    """The operator that gives the same without changing its first argument, if nothing can tell."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.split("::")[-1]
    if not name.endswith("_") or name.startswith("_") or not node.args:
        return None
    changed = node.args[0]
    if not isinstance(changed, Node) or len(changed.users) != 1:
        return None
    source = changed.target
    if not isinstance(source, torch._ops.OpOverload) or source._schema.is_mutable:
        return None  # in a chain the first is replaced first
    if any(r.alias_info is not None for r in source._schema.returns):
        return None
    value, result = changed.meta.get("val"), node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(result, torch.Tensor):
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is None or target._overloadname not in packet.overloads():
        return None
    counterpart = getattr(packet, target._overloadname)
    same = [a.name for a in counterpart._schema.arguments] == [
        a.name for a in target._schema.arguments
    ]
    return counterpart if same and value.dtype == result.dtype and _keeps_dtype(node) else None


def _keeps_dtype(node: Node) -> bool:
    """Whether the plain operator gives the dtype that the one in place keeps."""
    values = [a.meta.get("val") for a in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    deciding = [tensor for tensor in tensors if tensor.dim()] or tensors
    return len({tensor.dtype for tensor in deciding}) == 1
