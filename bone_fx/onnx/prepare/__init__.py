"""Rewrites of an exported graph, on a copy, so that every node has an ONNX translation.

`torch.onnx` decomposes a whole program with `run_decompositions` before it translates it, which
takes most of its time (8.7 of 11.5 s for 32 layers) and is needed for a handful of operators.
`prepare` rewrites those, and says which nodes it could not.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule

from bone_fx.graphs import copy_graph
from bone_fx.onnx.prepare.assertions import remove_assertions
from bone_fx.onnx.prepare.in_place import make_functional
from bone_fx.onnx.prepare.mode_regions import inline_mode_regions
from bone_fx.onnx.prepare.no_op_conversions import replace_conversions
from bone_fx.onnx.prepare.padding_masks import replace_padding_masks
from bone_fx.onnx.prepare.promotion import insert_promotions

STEPS: tuple[Callable[[GraphModule], None], ...] = (
    inline_mode_regions,  # first: the steps below do not look into regions
    remove_assertions,
    make_functional,  # before conversions go: `to` may return its input, mutations included
    replace_conversions,
    replace_padding_masks,
    insert_promotions,  # last: only functional operators are promoted
)


def prepare(graph_module: GraphModule) -> GraphModule:
    """A copy of `graph_module` after `STEPS`."""
    # Not compiled, as it is never called.
    prepared = _LazyGraphModule(graph_module, copy_graph(graph_module.graph))
    for step in STEPS:
        step(prepared)
    prepared.graph.eliminate_dead_code()
    prepared.graph.lint()
    return prepared
