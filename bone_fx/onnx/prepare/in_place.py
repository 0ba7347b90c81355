"""In-place operators on tensors that nothing else looks at, as functional ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

_FRESH_COMPOSITES = frozenset(
    {
        torch.ops.aten.einsum.default,
        torch.ops.aten.layer_norm.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.matmul.default,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.softmax.int,
    }
)
"""Composite operators that never return one of their inputs or a view of one."""


def make_functional(graph_module: GraphModule) -> None:
    """Replaces an in-place operator whose tensor was made in the graph and has no other view.

    Before: `y = aten.add_(x, b); z = aten.mul(x, c)`
    After:  `y = aten.add(x, b); z = aten.mul(y, c)`

    Where the tensor may share memory with another one (a view, an input, a weight) the node is left
    as it is, for the full functionalization of `run_decompositions`.
    """
    position = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    for node in graph_module.graph.nodes:
        functional = _functional_form(node)
        if functional is None:
            continue
        mutated = node.args[0]
        earlier = [user for user in mutated.users if position[user] < position[node]]
        if not _is_fresh(mutated) or not all(map(_is_fresh, earlier)) or _changes_dtype(node):
            continue
        node.target = functional
        mutated.replace_all_uses_with(
            node, delete_user_cb=lambda user, at=position[node]: position[user] > at
        )


def _functional_form(node: Node) -> OpOverload | None:
    target = node.target
    if (
        node.op != "call_function"
        or not isinstance(target, OpOverload)
        or target.namespace != "aten"
    ):
        return None
    packet, overload = target.__name__.split(".")
    if not packet.endswith("_") or packet.startswith("_") or not target._schema.is_mutable:
        return None
    functional = getattr(getattr(torch.ops.aten, packet[:-1], None), overload, None)
    if not isinstance(functional, OpOverload) or not isinstance(node.args[0], Node):
        return None
    same = [a.name for a in functional._schema.arguments] == [
        a.name for a in target._schema.arguments
    ]
    return functional if same else None


def _is_fresh(node: Node) -> bool:
    """Whether the node's result has memory of its own."""
    target = node.target
    if node.op == "output" or not isinstance(node.meta.get("val"), Tensor):
        return node.op == "call_function" and not isinstance(node.meta.get("val"), (list, tuple))
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    if any(result.alias_info is not None for result in target._schema.returns):
        return False
    if target in _FRESH_COMPOSITES:
        return True
    schema = target._schema
    name = f"{schema.name}.{schema.overload_name}".removesuffix(".")
    return not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _changes_dtype(node: Node) -> bool:
    """An in-place operator keeps its tensor's dtype where the functional one might promote."""
    values = [arg.meta.get("val") for arg in node.all_input_nodes]
    return len({value.dtype for value in values if isinstance(value, Tensor)}) > 1
