"""Rotary embeddings that stay in the graph work on tokens whose heads lie side by side.

Before (a rotary width that the attention operator does not take):
    heads:  [B, H, S, D] = transpose(x [B, S, H, D], 1, 2)
    turned: [B, H, S, D] = RotaryEmbedding(heads, positions, cos, sin, num_heads=H)
    y:      [B, S, H, D] = transpose(turned, 1, 2)

After:
    flat:   [B, S, H*D] = reshape(x)
    turned: [B, S, H*D] = RotaryEmbedding(flat, positions, cos, sin, num_heads=H)
    y:      [B, S, H, D] = reshape(turned)

The operator takes both forms. The reshapes meet those of the projection before and of the
attention operator behind, and are cancelled.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.lower.symbolic import CONTRIB, attributes, is_operator, operands
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def flatten_rotary(graph: Graph) -> Outcome:
    """Replaces the transpositions around rotary embeddings by reshapes."""
    changed = sum(_flatten(graph, node) for node in list(graph.nodes))
    return Outcome(modified=changed > 0)


def _flatten(graph: Graph, rotary: Node) -> bool:
    if not is_operator(rotary, CONTRIB, "RotaryEmbedding"):
        return False
    before = operands(rotary)[0]
    value: torch.Tensor = rotary.meta["val"]
    sizes = rotary.kwargs.get("shape")
    if before is None or value.dim() != 4 or not isinstance(sizes, list | tuple):
        return False
    source = before.args[0] if _swaps_heads(before) else None
    behind = next(iter(rotary.users)) if len(rotary.users) == 1 else None
    batch, heads, tokens, size = value.shape
    if not isinstance(source, Node) or behind is None or not _swaps_heads(behind):
        return False
    if attributes(rotary).get("num_heads") != heads:
        return False
    flat_sizes = [sizes[0], sizes[2], heads * size]
    flat_value = value.new_empty((batch, tokens, heads * size))
    with graph.inserting_before(rotary):
        flat = graph.call_function(aten.reshape.default, (source, flat_sizes))
    flat.meta = {**before.meta, "val": flat_value}
    rotary.replace_input_with(before, flat)
    rotary.update_kwarg("shape", flat_sizes)
    rotary.meta["val"] = flat_value
    with graph.inserting_before(behind):
        whole = [sizes[0], sizes[2], heads, size]
        back = graph.call_function(aten.reshape.default, (rotary, whole))
    back.meta = dict(behind.meta)
    behind.replace_all_uses_with(back)
    graph.erase_node(behind)
    return True


def _swaps_heads(node: Node) -> bool:
    """Whether a node turns [B, S, H, D] into [B, H, S, D], or back."""
    if node.target is not aten.transpose.int:
        return False
    return {int(axis) % 4 for axis in node.args[1:3]} == {1, 2}  # type: ignore[arg-type]
