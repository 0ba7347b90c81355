"""Moves rotary embeddings into the attention operator that takes them.

Before (phi; the slices and cat are absent where all columns of a head are turned):
    turned:  RotaryEmbedding(slice(q, 0, R), positions, cos, sin)
    heads:   [B, H, S, D] = cat(turned, slice(q, R, D))
    flat:    [B, S, H*D] = reshape(transpose(heads, 1, 2))
    GroupQueryAttention(flat, ...)                               k likewise

After:
    flat:    [B, S, H*D] = reshape(transpose(q, 1, 2))
    GroupQueryAttention(flat, ..., cos, sin, do_rotary=1)

Only where both q and k come from a rotary embedding with the same tables and nothing stands between
it and the operator but transpositions and reshapes that leave heads whole: a norm in between keeps
the rotary embedding in the graph. The operator counts positions as the graph does: row by row, from
the tokens before.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.lower.symbolic import CONTRIB, attributes, is_operator, operands, rewrite
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

COS, SIN = 7, 8
TABLE_MULTIPLE = 8
LAST = 2**63 - 1


def absorb_rotary(graph: Graph) -> Outcome:
    """Lets each GroupQueryAttention turn its own queries and keys, where it can."""
    changed = sum(_widen(graph, node) for node in list(graph.nodes))
    for node in list(graph.nodes):
        if is_operator(node, CONTRIB, "GroupQueryAttention"):
            changed += _absorb(node)
    return Outcome(modified=changed > 0)


def _widen(graph: Graph, node: Node) -> bool:
    """`cat(Rotary(x[..., :R]), x[..., R:])` is a rotary embedding of x that turns R columns."""
    if node.target is not aten.cat.default or len(node.args) < 2:
        return False
    parts, axis = node.args[0], node.args[1]
    rank = node.meta["val"].dim()
    assert isinstance(parts, list | tuple)
    if len(parts) != 2 or int(axis) % rank != rank - 1 or rank != 4:  # type: ignore[arg-type]
        return False
    embedding, rest = parts
    if (
        not isinstance(embedding, Node)
        or not is_operator(embedding, CONTRIB, "RotaryEmbedding")
        or len(embedding.users) != 1
    ):
        return False
    first, *tables = operands(embedding)
    head, tail = _slice(first), _slice(rest)
    if head is None or tail is None or head[0] is not tail[0]:
        return False
    x, start, width = head
    size = x.meta["val"].shape[-1]
    if start != 0 or tail[1] != width or tail[2] != size or tables[1] is None:
        return False
    values = {k: v for k, v in attributes(embedding).items() if isinstance(v, int | float)}
    values["rotary_embedding_dim"] = 2 * int(tables[1].meta["val"].shape[1])
    with graph.inserting_before(node):
        wide = graph.node_copy(embedding)
    wide.meta = dict(node.meta)
    rewrite(wide, [x, *tables], values)
    leading = embedding.kwargs["shape"]
    assert isinstance(leading, list | tuple)
    wide.update_kwarg("shape", [*leading[:-1], size])
    node.replace_all_uses_with(wide)
    graph.erase_node(node)
    return True


def _slice(node: object) -> tuple[Node, int, int] | None:
    """Source, start and end of a slice of the last axis."""
    if not isinstance(node, Node) or node.target is not aten.slice.Tensor:
        return None
    source, axis, start, end = (*node.args, None, None, None)[:4]
    assert isinstance(source, Node)
    shape = source.meta["val"].shape
    if not isinstance(axis, int) or axis % len(shape) != len(shape) - 1 or len(node.args) > 4:
        return None
    if not isinstance(shape[-1], int):
        return None
    begin = start if isinstance(start, int) else 0
    stop = end if isinstance(end, int) else LAST
    return source, begin, min(stop, shape[-1])


def _absorb(attention: Node) -> bool:
    inputs = operands(attention)
    values = {k: v for k, v in attributes(attention).items() if isinstance(v, int | float)}
    query, key = (_rotary_behind(i) for i in inputs[:2])
    if query is None or key is None or values.get("do_rotary"):
        return False
    settings = [attributes(r).get("interleaved", 0) for r in (query, key)]
    tables = [operands(r)[1:] for r in (query, key)]
    cos = tables[0][1]
    if settings[0] != settings[1] or tables[0] != tables[1] or cos is None:
        return False
    if int(cos.meta["val"].shape[1]) % TABLE_MULTIPLE:
        return False
    for rotary in (query, key):
        source = operands(rotary)[0]
        assert source is not None
        rotary.replace_all_uses_with(source)
    inputs = operands(attention)
    inputs += [None] * (SIN + 1 - len(inputs))
    inputs[COS], inputs[SIN] = tables[0][1:3]
    rewrite(
        attention, inputs, {**values, "do_rotary": 1, "rotary_interleaved": int(bool(settings[0]))}
    )
    return True


def _rotary_behind(node: Node | None) -> Node | None:
    """The rotary embedding whose heads reach the operator as they are, or None."""
    if node is None or node.target not in (
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
    ):
        return None
    source = node.args[0]
    while isinstance(source, Node) and source.target in (
        aten.contiguous.default,
        aten.clone.default,
    ):
        source = source.args[0]
    if not isinstance(source, Node) or source.target is not aten.transpose.int:
        return None
    if {int(a) % 4 for a in source.args[1:3]} != {1, 2}:  # type: ignore[arg-type]
        return None
    rotary = source.args[0]
    if not is_operator(rotary, CONTRIB, "RotaryEmbedding"):
        return None
    assert isinstance(rotary, Node)
    flat, heads = node.meta["val"].shape, rotary.meta["val"].shape
    alone = all(len(n.users) == 1 for n in (node, source, rotary))
    return rotary if alone and len(flat) == 3 and flat[-1] == heads[1] * heads[3] else None
