"""Leaves the product that only the model's output has to the loss.

Before:
    %logits = bone_fx.product(%x, %lm_head_weight, None);  return (%logits,)

After:
    %logits = bone_fx.head(%x, %lm_head_weight, None);     return (%logits,)

The values are the same; `operators/head.py` says when they are not formed.
"""

from __future__ import annotations

from torch.fx import Graph

from bone_fx.operators import HEAD, PRODUCT


def defer_logits(graph: Graph) -> int:
    """Replace products that only the output reads, in place; how many."""
    heads = [
        node
        for node in graph.output_node().all_input_nodes
        if node.target is PRODUCT and len(node.users) == 1
    ]
    for node in heads:
        node.target = HEAD
    return len(heads)
