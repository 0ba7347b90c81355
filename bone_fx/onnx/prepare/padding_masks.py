"""Attention masks that say no more than which tokens are padding, recognised by their values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from bone_fx.graphs import ancestors
from bone_fx.onnx.aten.scaled_attention import SDPA

_aten = torch.ops.aten
_SIZES = ((3, 5), (2, 7), (1, 4), (4, 2))
"""Batch sizes and lengths that are tried; every symbol of the graph is one of the two."""

_LONGEST = 2048
"""Tokens of the longest padding that is tried: a mask of it has four million values."""

_NO_SIZE = 1 << 31
"""From here on a number is no size of a window but "to the end" or "minus infinity"."""


def replace_padding_masks(graph_module: GraphModule) -> None:
    """Gives attention the padding itself where a model computes `[B, 1, S, T]` from it.

    Before: `scaled_dot_product_attention(q, k, v, f(attention_mask [B, T]))`, f being 25 operators
    After:  `scaled_dot_product_attention(q, k, v, (attention_mask != 0)[:, None, None, :])`

    f is run on random padding of several sizes and must give the definition every time; nothing is
    recognised by name. One size is longer than every window that the numbers in f can make. A mask
    that depends on anything else (causal, windowed, on scores) stays.
    """
    graph = graph_module.graph
    masks: dict[Node, Node] = {}
    for node in graph.find_nodes(op="call_function", target=SDPA):
        if len(node.args) > 3:
            mask, place = node.args[3], ("args", 3)
        else:
            mask, place = node.kwargs.get("attn_mask"), ("kwargs", 0)
        if not isinstance(mask, Node) or not _is_four_dimensional_boolean(mask):
            continue
        padding = masks.get(mask) or _padding_behind(graph_module, mask)
        if padding is None:
            continue
        short = masks[mask] if mask in masks else _insert(graph, mask, padding)
        masks[mask] = short
        if place[0] == "args":
            node.update_arg(3, short)
        else:
            node.update_kwarg("attn_mask", short)


def _is_four_dimensional_boolean(mask: Node) -> bool:
    value = mask.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 4 or value.dtype != torch.bool:
        return False
    return str(value.shape[2]) != "1"


def _padding_behind(graph_module: GraphModule, mask: Node) -> Node | None:
    """The input `[B, T]` that decides the mask, if the mask is that input and nothing more."""
    needed = ancestors(mask)
    if needed is None or any(
        node.op not in ("placeholder", "call_function", "get_attr") for node in needed
    ):
        return None
    sources = [node for node in needed if node.op == "placeholder" and _is_read(node, needed)]
    if len(sources) != 1:
        return None
    (source,) = sources
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2 or value.is_floating_point():
        return None
    length = _longer_than_windows(graph_module, needed)
    if length is None:
        return None
    try:
        agrees = all(
            _agrees(actual, padding)
            for padding, actual in _tried(graph_module, needed, source, value, mask, length)
        )
    except Exception:  # noqa: BLE001 -- what cannot be run is not recognised, and stays
        return None
    return source if agrees else None


def _longer_than_windows(graph_module: GraphModule, needed: list[Node]) -> int | None:
    """A length beyond every window, chunk or table that nodes can mean; None if that is too long.

    A window is one number of the graph, twice one, or a product of several (blocks of a size).
    """
    numbers: set[int] = set()
    for node in needed:
        if node.op == "get_attr":
            tensor = getattr(graph_module, str(node.target))
            if isinstance(tensor, pytree.TreeSpec):  # of a function's arguments: no number
                continue
            if not isinstance(tensor, Tensor):
                return None
            numbers |= set(tensor.shape)
            leaves = tensor.flatten().tolist() if tensor.numel() <= _LONGEST else []
        else:
            leaves = pytree.tree_leaves((node.args, node.kwargs))
        numbers |= {
            math.ceil(abs(leaf))
            for leaf in leaves
            if isinstance(leaf, int | float) and abs(leaf) < _NO_SIZE
        }
    several = [number for number in numbers if number > 1]
    lengths = (2 * math.prod(several) + 3, 2 * sum(several) + 3)
    return next((length for length in lengths if length <= _LONGEST), None)


def _is_read(node: Node, within: list[Node]) -> bool:
    """Whether more than the node's sizes is asked for."""
    users = [user for user in node.users if user in within]
    return any(user.target is not _aten.sym_size.int for user in users)


def _tried(
    graph_module: GraphModule,
    needed: list[Node],
    source: Node,
    value: Tensor,
    mask: Node,
    longest: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Padding at random and the mask that the graph makes of it."""
    generator = torch.Generator().manual_seed(0)
    for trial, (batch, length) in enumerate((*_SIZES, (2, longest))):
        other = 1 if trial % 2 else length + 1
        sizes = {str(value.shape[0]): batch, str(value.shape[1]): length}
        shape = [int(sizes.get(str(dim), 0) or str(dim)) for dim in value.shape]
        high = 2 if value.dtype == torch.bool else 3  # 2 is no padding either
        padding = torch.randint(0, high, shape, generator=generator).to(value.dtype)
        padding[0] = 1
        values: dict[Node, Any] = {}
        for node in needed:
            if node is source:
                values[node] = padding
            elif node.op == "placeholder":
                values[node] = _empty(node, sizes, other)
            elif node.op == "get_attr":
                values[node] = getattr(graph_module, str(node.target))
            else:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        yield padding, values[mask]


def _empty(node: Node, sizes: dict[str, int], other: int) -> Tensor:
    """What stands for an input of which only sizes are asked, other symbols among them.

    A batch may have a symbol of its own in every input, and a decoder has a length of its own. The
    size `other` of such a length is longer than the mask in one trial and 1 in the next: behind a
    long past, a causal mask hides nothing.
    """
    batch = next(iter(sizes.values()))
    shape = [
        dim if isinstance(dim, int) else sizes.setdefault(str(dim), other if place else batch)
        for place, dim in enumerate(node.meta["val"].shape)
    ]
    return torch.empty(shape, dtype=torch.bool)


def _agrees(actual: object, padding: Tensor) -> bool:
    if not isinstance(actual, Tensor) or actual.dim() != 4 or actual.shape[1] != 1:
        return False
    batch, length = padding.shape
    if (actual.shape[0], actual.shape[3]) != (batch, length):
        return False
    return torch.equal(actual, (padding != 0)[:, None, None, :].expand_as(actual))


def _insert(graph: Graph, mask: Node, padding: Node) -> Node:
    """`(padding != 0)[:, None, None, :]` before the mask, of the mask's own batch."""
    node = padding
    with graph.inserting_before(mask):
        if padding.meta["val"].dtype != torch.bool:
            target = torch.ops.prims.convert_element_type.default
            node = _call(graph, target, node, torch.bool)
        node = _call(graph, _aten.unsqueeze.default, node, 1)
        node = _call(graph, _aten.unsqueeze.default, node, 2)
    node.meta["val"] = mask.meta["val"][:, :, :1]
    return node


def _call(graph: Graph, target: Any, source: Node, argument: Any) -> Node:
    node = graph.call_function(target, (source, argument))
    node.meta["val"] = target(source.meta["val"], argument)
    return node
