"""Writes products with a transposed weight as the linear layers that they are.

Before (falcon):
    turned:  [I, O] = numpy_T(weight)
    product: [B, S, O] = matmul(x, turned)
    y:       [B, S, O] = add(product, bias)      absent without a bias

After:
    y:       [B, S, O] = linear(x, weight, bias)
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def find_linears(graph: Graph) -> Outcome:
    """Replaces such products, with the bias that is added to them."""
    changed = False
    for node in graph.find_nodes(op="call_function", target=aten.matmul.default, sort=True):
        weight = _turned(node.args[1])
        if weight is not None and not node.kwargs:
            _replace(graph, node, weight)
            changed = True
    return Outcome(modified=changed)


def _turned(node: object) -> Node | None:
    """The weight [O, I] behind a transposition of a matrix."""
    if not isinstance(node, Node) or node.meta["val"].dim() != 2:
        return None
    swapped = node.target is aten.transpose.int and {int(a) % 2 for a in node.args[1:3]} == {0, 1}  # type: ignore[arg-type]  # axes are numbers
    if node.target not in (aten.numpy_T.default, aten.t.default) and not swapped:
        return None
    weight = node.args[0]
    return weight if isinstance(weight, Node) and weight.op == "placeholder" else None


def _replace(graph: Graph, product: Node, weight: Node) -> None:
    x = product.args[0]
    assert isinstance(x, Node)
    last, constants = product, [weight]
    users = list(product.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor and not users[0].kwargs:
        others = [a for a in users[0].args if a is not product]
        bias = others[0] if len(others) == 1 else None
        rows = product.meta["val"].shape[-1]
        if isinstance(bias, Node) and bias.op == "placeholder" and _is_vector(bias, rows):
            last, constants = users[0], [weight, bias]
    with graph.inserting_before(last):
        linear = graph.call_function(aten.linear.default, (x, *constants))
    linear.meta = dict(last.meta)
    last.replace_all_uses_with(linear)
    graph.erase_node(last)
    if last is not product:
        graph.erase_node(product)


def _is_vector(node: Node, length: int) -> bool:
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dim() == 1 and value.shape[0] == length
