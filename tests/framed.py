"""A pass run by the frame, as a table runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec

from torch.fx import Graph, GraphModule

from bone_fx.graphs import copy_module
from bone_fx.passes.frame import Frame, Outcome, PassResult

P = ParamSpec("P")


def apply(
    run: Callable[Concatenate[Graph, P], Outcome],
    gm: GraphModule,
    *args: P.args,
    **kwargs: P.kwargs,
) -> PassResult:
    """A pass on a compiled copy of a graph, without what is dead afterwards."""
    copied = copy_module(gm)
    outcome = Frame(copied.graph, sweep=True).run(run, *args, **kwargs)
    copied.recompile()
    return PassResult(copied, outcome.modified, outcome.applied, outcome.refused)


def modifies(run: Callable[[Graph], Outcome], graph: Graph) -> bool:
    """Run a pass on a graph; whether it changed anything."""
    return Frame(graph).run(run).modified
