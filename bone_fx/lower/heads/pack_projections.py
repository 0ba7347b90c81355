"""Packs the projections of queries, keys and values into one product.

Before:
    q:  [B, S, H*D] = linear(x, w_q, b_q)
    k:  [B, S, K*D] = linear(x, w_k, b_k)
    v:  [B, S, K*D] = linear(x, w_v, b_v)
    GroupQueryAttention(q, k, v, …)

After:
    qkv: [B, S, (H+2*K)*D] = linear(x, cat(w_q, w_k, w_v), cat(b_q, b_k, b_v))
    GroupQueryAttention(qkv, , , …)

The concatenations of weights never run: the translation makes them steps of the weights' recipes.
A projection that the model itself packed, and then cut in this order, is handed over uncut. What
stands between projection and attention, as a norm does, keeps the operator's inputs apart.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

from bone_fx.lower.symbolic import CONTRIB, attributes, is_operator, operands, rewrite
from bone_fx.passes.frame import PassResult, copy_module, graph_pass

aten = torch.ops.aten


@graph_pass
def pack_projections(gm: GraphModule) -> PassResult:
    """Gives each GroupQueryAttention one packed input where its projections allow it."""
    copied = copy_module(gm)
    graph = copied.graph
    changed = 0
    for node in list(graph.nodes):
        if is_operator(node, CONTRIB, "GroupQueryAttention"):
            changed += _pack(graph, node)
    graph.eliminate_dead_code()
    return PassResult(copied if changed else gm, modified=changed > 0)


def _pack(graph: Graph, attention: Node) -> bool:
    inputs = operands(attention)
    parts = [part for part in inputs[:3] if part is not None]
    if len(parts) != 3:
        return False
    packed = _uncut(parts) or joined(graph, parts)
    if packed is None:
        return False
    values = {k: v for k, v in attributes(attention).items() if isinstance(v, int | float)}
    rewrite(attention, [packed, None, None, *inputs[3:]], values)
    return True


def joined(graph: Graph, parts: list[Node]) -> Node | None:
    """One product for three of the same input; None where they are no such products."""
    if any(p.target is not aten.linear.default or p.kwargs or len(p.users) != 1 for p in parts):
        return None
    arguments = [(*part.args, None)[:3] for part in parts]
    sources, weights, biases = (list(column) for column in zip(*arguments, strict=True))
    if any(source is not sources[0] for source in sources) or len(set(weights)) != 3:
        return None
    if any(not isinstance(w, Node) or w.op != "placeholder" for w in weights):
        return None
    with_bias = [isinstance(bias, Node) for bias in biases]
    if any(with_bias) and not all(with_bias):
        return None
    first = min(parts)
    with graph.inserting_before(first):
        joined = [_concatenated(graph, weights)]
        if all(with_bias):
            joined.append(_concatenated(graph, biases))
        product = graph.call_function(aten.linear.default, (sources[0], *joined))
    width = sum(int(part.meta["val"].shape[-1]) for part in parts)
    value: torch.Tensor = first.meta["val"]
    product.meta = {**first.meta, "val": value.new_empty((*value.shape[:-1], width))}
    return product


def _concatenated(graph: Graph, constants: list[Node]) -> Node:
    node = graph.call_function(aten.cat.default, (constants,))
    value: torch.Tensor = constants[0].meta["val"]
    rows = sum(int(constant.meta["val"].shape[0]) for constant in constants)
    node.meta = {"val": value.new_empty((rows, *value.shape[1:]))}
    return node


def _uncut(parts: list[Node]) -> Node | None:
    """The projection of which the three are consecutive columns, all of them."""
    ranges = [columns_of(part) for part in parts]
    source, end = None, 0
    for found in ranges:
        if found is None or found[1] != end or (source is not None and found[0] is not source):
            return None
        source, _, end = found
    return source if source is not None and end == source.meta["val"].shape[-1] else None


def columns_of(node: Node) -> tuple[Node, int, int] | None:
    """Source, start and end of a piece cut along the last axis."""
    if node.target is aten.slice.Tensor:
        source, axis, start, end = (*node.args, None, None)[:4]
        step = node.args[4] if len(node.args) > 4 else 1
    elif node.target is operator.getitem and isinstance(node.args[0], Node):
        return _piece(node.args[0], node.args[1])
    else:
        return None
    assert isinstance(source, Node)
    shape = source.meta["val"].shape
    if not isinstance(axis, int) or axis % len(shape) != len(shape) - 1 or step != 1:
        return None
    width = shape[-1]
    if not isinstance(width, int):
        return None
    begin, stop, _ = slice(_number(start), _number(end)).indices(width)
    return source, begin, stop


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _piece(split: Node, place: object) -> tuple[Node, int, int] | None:
    """The same for a piece of a split."""
    if split.target not in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.split.sizes,
        aten.chunk.default,
    ):
        return None
    source = split.args[0]
    assert isinstance(source, Node)
    rank = source.meta["val"].dim()
    axis = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    if not isinstance(axis, int) or axis % rank != rank - 1 or not isinstance(place, int):
        return None
    widths = [piece.shape[-1] for piece in split.meta["val"]]
    if not all(isinstance(width, int) for width in widths):
        return None
    start = sum(widths[:place])
    return source, start, start + widths[place]
