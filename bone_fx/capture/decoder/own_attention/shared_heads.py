"""Keys and values that a model repeats for several query heads before they reach the cache.

Falcon's `new_decoder_architecture` expands each key to the heads of its group:

    x:    [B, S, K, 1, D]
    wide: [B, S, K, G, D] = expand(x)
    key:  [B, K*G, S, D] = rotary embedding of transpose(flatten(wide))

A cache of one head a group holds the same. Shape letters: B batch, S new tokens, K key/value heads,
G query heads that share one, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from bone_fx.lower.symbolic import CONTRIB, attributes, is_operator, operands, rewrite

aten = torch.ops.aten


@dataclass(frozen=True)
class Shared:
    """How the heads of keys or values came about.

    Attributes:
        source: Each once, [B, S, K, 1, D].
        rotary: The rotary embedding that turns the repeated ones; None if none does.
        groups: G.
    """

    source: Node
    rotary: Node | None
    groups: int


def shared_behind(node: Node, layout: set[Any]) -> Shared | None:
    """What is behind keys or values that are repeated, through layout operators alone.

    Args:
        node: Keys or values [B, K*G, S, D], or every G-th head of them.
        layout: The operators that change no number.
    """
    rotary = None
    if node.target is aten.slice.Tensor and node.args[1] == 1:
        node = node.args[0]  # type: ignore[assignment]  # the first argument of a slice
    while node.target not in (aten.expand.default, aten.broadcast_to.default):
        if rotary is None and is_operator(node, CONTRIB, "RotaryEmbedding"):
            rotary, source = node, operands(node)[0]
        else:
            source = node.args[0] if node.target in layout else None  # type: ignore[assignment]
        if not isinstance(source, Node):
            return None
        node = source
    source = node.args[0]  # type: ignore[assignment]
    if not isinstance(source, Node):
        return None
    narrow, wide = source.meta["val"].shape, node.meta["val"].shape
    if len(narrow) != 5 or len(wide) != 5 or narrow[3] != 1 or not isinstance(wide[3], int):
        return None
    return Shared(source, rotary, wide[3]) if isinstance(narrow[2], int) else None


def groups_of(node: Node, layout: set[Any], run: Callable[..., list[torch.Tensor]]) -> int:
    """G for keys or values [B, K*G, S, D], found by running what repeats them; 1 for none.

    Args:
        node: The keys or values.
        layout: The operators that change no number.
        run: `attention_regions.Runner.run`.
    """
    shared = shared_behind(node, layout)
    if shared is None:
        return 1
    value = shared.source.meta["val"]
    mask = torch.ones(2, 3, dtype=torch.long)
    x = torch.randn(2, 3, *value.shape[2:], generator=torch.Generator().manual_seed(0))
    x = x.to(value.dtype)
    below = node if shared.rotary is None else operands(shared.rotary)[0]
    (found,) = run([below], {shared.source: x}, mask, 3)
    if shared.rotary is not None:  # it turns every head alike
        (found,) = run([node], {shared.rotary: found}, mask, 3)
    once = x[:, :, :, 0].transpose(1, 2)
    repeated = once.repeat_interleave(shared.groups, 1)
    return shared.groups if torch.equal(found, repeated) else 1


def each_once(graph: Graph, node: Node, layout: set[Any], sizes: list[Node]) -> Node:
    """Writes every G-th head [B, K, S, D] of repeated keys or values from those that they repeat.

    Args:
        graph: The graph, at the place where the nodes are to stand.
        node: Every G-th head; given back if it is something else.
        layout: The operators that change no number.
        sizes: Nodes of B and S.
    """
    shared = shared_behind(node, layout) if node.target is aten.slice.Tensor else None
    if shared is None:
        return node
    value = shared.source.meta["val"]
    shape: list[Any] = [*sizes[:2], int(value.shape[2]), int(value.shape[4])]
    heads = graph.call_function(aten.reshape.default, (shared.source, shape))
    heads.meta = {**node.meta, "val": value.squeeze(3)}
    turned = graph.call_function(aten.transpose.int, (heads, 1, 2))
    turned.meta = {**node.meta, "val": heads.meta["val"].transpose(1, 2)}
    if shared.rotary is None:
        return turned
    rotary = graph.node_copy(shared.rotary)
    numbers = {k: v for k, v in attributes(rotary).items() if isinstance(v, int | float)}
    rewrite(rotary, [turned, *operands(rotary)[1:]], {**numbers, "num_heads": shape[2]})
    rotary.kwargs = {**rotary.kwargs, "shape": [shape[0], shape[2], shape[1], shape[3]]}
    rotary.meta = dict(turned.meta)
    return rotary
