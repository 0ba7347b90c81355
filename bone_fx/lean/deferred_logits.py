"""Marks the product that makes the logits, so that a loss can take it in chunks.

Before:
    %logits = aten.linear(%x, %lm_head_weight);   return (%logits,)

After:
    %logits = bone_fx.head(%x, %lm_head_weight);  return (%logits,)

The values are the same; `operators/loss/head.py` says when they are not formed.
"""

from __future__ import annotations

import torch
from torch.fx import Graph

from bone_fx.operators import HEAD
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten


def defer_logits(graph: Graph) -> Outcome:
    """Replace products that only the output reads."""
    heads = [
        node
        for node in graph.output_node().all_input_nodes
        if node.target is aten.linear.default and len(node.users) == 1
    ]
    for node in heads:
        node.target = HEAD
    return Outcome(modified=bool(heads))
