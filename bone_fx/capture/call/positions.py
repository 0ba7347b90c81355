"""How long an input may be where a model looks its positions up in a table.

A slice of a table gives the tracer a bound; a lookup by computed indices (gpt2, opt, roberta, bart)
gives none, and a longer input is an index error, or on CUDA a dead process. So the indices are
computed for a few lengths, by the graph's own nodes on a row of one token, and followed to the end
of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from bone_fx.capture.call.signature import CallSignature
from bone_fx.graphs import ancestors, attribute_at

_MOST_NODES = 60
"""A lookup whose indices take more nodes than that is not one of positions."""


def largest_lengths(
    graph_module: GraphModule, signature: CallSignature, token: int
) -> dict[str, int]:
    """For each named size of the signature, the largest that all tables of positions have rows for.

    Args:
        graph_module: The captured graph.
        signature: Its call.
        token: A token that is not padding.

    Returns:
        Only the sizes for which a table ends; a size that is bounded otherwise is not looked at
        again.
    """
    names = {
        s for a in signature.arguments for shape in a.shapes for s in shape if isinstance(s, str)
    }
    largest: dict[str, int] = {}
    for rows, indices in _lookups(graph_module):
        needed = ancestors(indices, _MOST_NODES)
        if needed is None or any(n.target is torch.ops.aten.embedding.default for n in needed):
            continue
        for name in sorted(names - {"batch"} - set(signature.largest)):
            limit = _limit(graph_module, signature, needed, rows, name, token)
            if limit is not None:
                largest[name] = min(limit, largest.get(name, limit))
    return largest


def _lookups(graph_module: GraphModule) -> Iterator[tuple[int, Node]]:
    """(rows of the table, node of the indices) for every lookup in a parameter or buffer."""
    for node in graph_module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default:
            table, indices = node.args[0], node.args[1]
        elif node.target is torch.ops.aten.index.Tensor and len(node.args[1]) == 1:
            table, indices = node.args[0], node.args[1][0]
        else:
            continue
        if table.op == "get_attr" and isinstance(indices, Node) and indices.op == "call_function":
            yield int(attribute_at(graph_module, str(table.target)).shape[0]), indices


def _limit(
    graph_module: GraphModule,
    signature: CallSignature,
    needed: list[Node],
    rows: int,
    name: str,
    token: int,
) -> int | None:
    """The largest size called `name` with indices within `rows`, if they grow by one with it."""

    def largest_index(size: int) -> int | None:
        return _largest_index(graph_module, signature, needed, {name: size}, token)

    two, three = largest_index(2), largest_index(3)
    if two is None or three is None or three != two + 1 or two >= rows:
        return None
    limit = rows + 1 - two
    return (
        limit if largest_index(limit + 1) == rows else None
    )  # buckets of distances stop growing before


def _largest_index(
    graph_module: GraphModule,
    signature: CallSignature,
    needed: list[Node],
    sizes: dict[str, int],
    token: int,
) -> int | None:
    values: dict[Node, Any] = {}
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    shapes = [(a.name, shape) for a in signature.arguments for shape in a.shapes]
    rows = dict(zip(placeholders, shapes, strict=True))
    with torch.no_grad():
        for node in needed:
            if node.op == "placeholder":
                name, shape = rows[node]
                if any(size is None for size in shape):
                    return None
                shape = [
                    1 if s == "batch" else s if isinstance(s, int) else sizes.get(str(s), 2)
                    for s in shape
                ]
                example = node.meta["val"]
                value = 1 if name.endswith("mask") else token
                values[node] = torch.full(shape, value, dtype=example.dtype, device=example.device)
            elif node.op == "get_attr":
                values[node] = attribute_at(graph_module, str(node.target))
            else:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                try:
                    values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                except (IndexError, RuntimeError):
                    return None  # a length that another table does not have
    last = values[needed[-1]]
    if (
        not isinstance(last, torch.Tensor)
        or last.is_floating_point()
        or last.dtype == torch.bool
        or not last.numel()
    ):
        return None
    return int(last.max())
