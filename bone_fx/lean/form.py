"""The form in which a training graph runs."""

from __future__ import annotations

from torch import fx

from bone_fx.lean.chains import keep_less
from bone_fx.lean.grouped_heads import group_heads
from bone_fx.lean.join_sites import join_sites
from bone_fx.lean.look_at_masks import look_at_masks
from bone_fx.passes.follow_device import follow_device
from bone_fx.passes.frame import copy_graph


def lean_form(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that computes the same and keeps less for backward."""
    copied = copy_graph(graph)
    follow_device(copied)
    join_sites(copied)
    keep_less(copied)
    group_heads(copied)
    look_at_masks(copied)
    return copied
