"""Which operators may stand in a graph after a stage.

What a stage leaves behind would otherwise be met stages later, where nobody knows whose it was.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from bone_fx.errors import PassError
from bone_fx.operators import ADAPTED_LINEAR

_OURS = "bone_fx"
"""Domain of what a capture marks in a graph, and namespace of what training puts into one."""


@dataclass(frozen=True)
class Stage:
    """A stage of a graph.

    Attributes:
        name: For messages.
        operators: Those of this package that may stand in the graph.
        calls_modules: Whether nodes may call submodules.
    """

    name: str
    operators: Collection[object]
    calls_modules: bool


TRAINING = Stage("insertion", (ADAPTED_LINEAR,), calls_modules=True)
"""The graph that an adapted module shows: one node a site, nothing of the form in which it runs."""

LOWERED = Stage("lowering", (), calls_modules=False)
"""The graph of a decoder: no marks of its capture, no operators of training."""


def verify(stage: Stage, graph: fx.Graph) -> None:
    """Check which operators stand in a graph.

    Raises:
        PassError: One that may not; the message names the stage and the node.
    """
    for node in graph.nodes:
        if _is_foreign(stage, node):
            name = node.args[1] if _is_symbolic(node) else node.target
            raise PassError(
                f"after {stage.name} the graph still has {name} at node {node.name}",
                expected=", ".join(map(str, stage.operators)) or f"no operator of {_OURS}",
            )


def _is_foreign(stage: Stage, node: fx.Node) -> bool:
    if node.op == "call_module":
        return not stage.calls_modules
    if _is_symbolic(node):
        return node.kwargs.get("domain") == _OURS
    ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == _OURS
    return ours and node.target not in stage.operators


def _is_symbolic(node: fx.Node) -> bool:
    """Whether a node is an operator of ONNX."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "onnx_symbolic"
