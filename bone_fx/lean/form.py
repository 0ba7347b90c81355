"""The forms in which graphs run: passes that let them keep less for backward, in their order."""

from __future__ import annotations

from torch import fx

from bone_fx.graphs import copy_graph
from bone_fx.lean.chains import keep_less
from bone_fx.lean.deferred_logits import defer_logits
from bone_fx.lean.grouped_heads import group_heads, look_at_masks
from bone_fx.lean.join_sites import join_sites
from bone_fx.passes.follow_device import follow_device
from bone_fx.passes.frame import Frame, Keeps, Row

# Of a graph that trains nothing.
PLAIN: tuple[Row, ...] = (Row(follow_device, Keeps.BITS),)

# Of a layer of a training graph.
LAYER: tuple[Row, ...] = (
    *PLAIN,
    Row(join_sites, Keeps.LAST_BIT),  # gradients are summed in another order; losses are the same
    Row(keep_less, Keeps.LAST_BIT),  # likewise: backward recomputes
    Row(group_heads, Keeps.LAST_BIT),  # gradients of repeated heads are summed in the kernel
    Row(look_at_masks, Keeps.LAST_BIT, "after group_heads, which looks for the plain operator"),
)

# Of a training graph with its output.
MODEL: tuple[Row, ...] = (*LAYER, Row(defer_logits, Keeps.BITS))


def running_form(graph: fx.Graph, rows: tuple[Row, ...]) -> fx.Graph:
    """A copy of a graph after the passes of a table."""
    copied = copy_graph(graph)
    Frame(copied).run_table(rows)
    return copied
