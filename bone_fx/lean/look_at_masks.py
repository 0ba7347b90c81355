"""Lets attention leave out a mask that hides nothing, or only what comes later.

Before:
    %y = aten.scaled_dot_product_attention(%q, %k, %v, %mask)

After:
    %y = bone_fx.attention(%q, %k, %v, %mask)

The operator looks at the mask's values, which no trace can. For the form in which a graph runs
(`lean.form`).
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from bone_fx.operators import ATTENTION

aten = torch.ops.aten


def look_at_masks(graph: Graph) -> int:
    """Rewrite attention under a mask of its own argument, in place; how many."""
    changed = 0
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        is_masked = len(node.args) in (4, 5) and isinstance(node.args[3], Node)
        if not is_masked or not set(node.kwargs) <= {"scale", "enable_gqa"}:
            continue
        node.target = ATTENTION
        changed += 1
    return changed
