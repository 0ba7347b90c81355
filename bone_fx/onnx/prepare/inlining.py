"""A node replaced by a graph that computes the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node


def inline(node: Node, body: Graph, inputs: Sequence[Any], *, attributes: str = "") -> None:
    """Puts the nodes of a body in the place of a node, in the node's graph.

    Before: `pair = node(x, y); first = pair[0]`
    After:  `first = aten.mul(x, y)`, the body being `aten.mul(a, b), ...`

    Args:
        node: What is replaced and erased, with the `getitem` nodes that read it.
        body: A graph that gives what the node gives.
        inputs: What stands for each of its placeholders.
        attributes: Where the attributes that it reads are found from the node's module.
    """
    graph = node.graph
    with graph.inserting_before(node):
        copies: dict[Node, Any] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
        for inner in body.nodes:
            if inner.op == "get_attr":
                copies[inner] = graph.get_attr(f"{attributes}{inner.target}")
                copies[inner].meta = dict(inner.meta)
            elif inner.op not in ("placeholder", "output"):
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
    outputs = torch.fx.map_arg(body.output_node().args[0], copies.__getitem__)
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(outputs, (list, tuple)):
            assert isinstance(user.args[1], int)
            replacement = outputs[user.args[1]]
            assert isinstance(replacement, Node)
            user.replace_all_uses_with(replacement)
            graph.erase_node(user)
    if node.users:
        assert isinstance(outputs, Node)
        node.replace_all_uses_with(outputs)
    graph.erase_node(node)
