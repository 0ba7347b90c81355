"""Operators without an ONNX translation, as operators that have one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from bone_fx.onnx.prepare.inlining import inline

_ROUNDS = 8
"""Decompositions of decompositions; more would be one that leads back to itself."""


def decompose_nodes(graph_module: GraphModule, unknown: Callable[[Node], bool]) -> bool:
    """Replaces the nodes that are unknown by their decompositions, and leaves the others alone.

    Before: `y = aten.square(x); z = aten.linear(y, w)`
    After:  `y = aten.pow(x, 2); z = aten.linear(y, w)`

    Args:
        graph_module: A graph whose nodes have fake values; it is changed in place.
        unknown: Whether a node has no translation.

    Returns:
        Whether anything was replaced. What has no decomposition stays.
    """
    changed = False
    for _ in range(_ROUNDS):
        candidates = [(node, _body(node)) for node in graph_module.graph.nodes if unknown(node)]
        bodies = [(node, body) for node, body in candidates if body is not None]
        if not bodies:
            break
        for node, body in bodies:
            inline(node, body, node.all_input_nodes)
        changed = True
    if changed:
        graph_module.graph.eliminate_dead_code()
    return changed


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's own, those that `torch.export` uses before the others."""
    return {**torch._decomp.decomposition_table, **torch.export.default_decompositions()}


def _body(node: Node) -> Graph | None:
    """What a node does in terms of its input nodes; None if nothing is known about it."""
    target = node.target
    if not isinstance(target, OpOverload) or target._schema.is_mutable:
        return None
    name = f"{target._schema.name}.{target._schema.overload_name}".removesuffix(".")
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")
    function = _decompositions().get(target)
    if function is None and not composite:
        return None
    inputs = node.all_input_nodes
    values = [source.meta.get("val") for source in inputs]
    mode = detect_fake_mode(values)
    if mode is None:
        return None

    def call(*arguments: Any) -> Any:
        of = dict(zip(inputs, arguments, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), of.__getitem__)
        return target(*args, **kwargs)

    table = {} if function is None else {target: function}
    with mode, torch.no_grad():
        body = make_fx(call, decomposition_table=table, _allow_non_fake_inputs=True)(*values).graph
    same = any(inner.target is target for inner in body.nodes)
    constants = bool(body.find_nodes(op="get_attr"))
    return None if same or constants else body
