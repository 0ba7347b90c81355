"""Packs the projections of queries, keys and values into one product.

Before:
    q:  [B, S, H*D] = linear(x, w_q, b_q)
    k:  [B, S, K*D] = linear(x, w_k, b_k)
    v:  [B, S, K*D] = linear(x, w_v, b_v)
    GroupQueryAttention(q, k, v, …)

After:
    qkv: [B, S, (H+2*K)*D] = linear(x, cat(w_q, w_k, w_v), cat(b_q, b_k, b_v))
    GroupQueryAttention(qkv, , , …)

Where a norm of each head stands between projection and attention (qwen3), which keeps the
operator's inputs apart:
    qkv:     [B, S, (H+2*K)*D] = linear(x, cat(w_q, w_k, w_v), …)
    q, k, v: split(qkv, [H*D, K*D, K*D], 2)

The concatenations of weights never run: the translation makes them steps of the weights' recipes.
A projection that the model itself packed, and then cut in this order, is handed over uncut.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from bone_fx.lower.heads.move_norms import is_row_norm
from bone_fx.lower.symbolic import CONTRIB, SINGLE, attributes, is_operator, operands, rewrite
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten
MOVES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.transpose.int}


def pack_projections(graph: Graph) -> Outcome:
    """Computes the three projections of each GroupQueryAttention by one product."""
    changed = 0
    for node in list(graph.nodes):
        if is_operator(node, CONTRIB, "GroupQueryAttention"):
            parts = operands(node)[:3]
            changed += _pack(graph, node) or _join(graph, [_product_behind(p) for p in parts])
    return Outcome(modified=changed > 0)


def _pack(graph: Graph, attention: Node) -> bool:
    """The operator takes the product as it is."""
    inputs = operands(attention)
    parts = [part for part in inputs[:3] if part is not None]
    if len(parts) != 3:
        return False
    packed = _uncut(parts) or _joined(graph, parts)
    if packed is None:
        return False
    values = {k: v for k, v in attributes(attention).items() if isinstance(v, int | float)}
    rewrite(attention, [packed, None, None, *inputs[3:]], values)
    return True


def _product_behind(node: Node | None) -> Node | None:
    """The projection that norms, reshapes and a rotary embedding lead back to."""
    while node is not None and (
        node.target in MOVES or is_row_norm(node) or is_operator(node, CONTRIB, "RotaryEmbedding")
    ):
        node = operands(node)[0] if node.target is SINGLE else node.all_input_nodes[0]
    return node if node is not None and node.target is aten.linear.default else None


def _join(graph: Graph, products: list[Node | None]) -> bool:
    """The product is split again."""
    parts = [part for part in products if part is not None]
    if len(parts) != 3 or len(set(parts)) != 3:
        return False
    packed = _joined(graph, parts)
    if packed is None:
        return False
    widths = [int(part.meta["val"].shape[-1]) for part in parts]
    values = torch.split(packed.meta["val"], widths, dim=-1)
    axis = packed.meta["val"].dim() - 1
    with graph.inserting_after(packed):
        cut = graph.call_function(aten.split_with_sizes.default, (packed, widths, axis))
    cut.meta = {"val": values}
    with graph.inserting_after(cut):
        for place, part in enumerate(parts):
            piece = graph.call_function(operator.getitem, (cut, place))
            piece.meta = dict(part.meta)
            part.replace_all_uses_with(piece)
            graph.erase_node(part)
    return True


def _joined(graph: Graph, parts: list[Node]) -> Node | None:
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
        constants = [_concatenated(graph, weights)]
        if all(with_bias):
            constants.append(_concatenated(graph, biases))
        product = graph.call_function(aten.linear.default, (sources[0], *constants))
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
    for cut in ranges:
        if cut is None or cut[1] != end or (source is not None and cut[0] is not source):
            return None
        source, _, end = cut
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
