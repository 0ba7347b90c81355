"""Switching a captured graph between training and evaluation.

A graph that was traced in training mode has the mode written into it as literals:

    Before: aten.dropout(x, 0.1, True)   sdpa(q, k, v, mask, 0.1)   aten.batch_norm(...,
        training=True, ...)
    After:  aten.dropout(x, 0.1, False)  sdpa(q, k, v, mask, 0.0)   aten.batch_norm(...,
        training=False, ...)

The literals of training are kept in `node.meta`, so the way back is exact, also for a copy of the
graph that was made in evaluation mode. Subgraphs of higher-order operators are switched too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

TRAINING_LITERALS = "bone_fx_training_literals"
"""Key of `node.meta`: {index of the argument: its value in training}."""

# Operator (without its overload and any trailing underscore) -> {argument: its value in
# evaluation}.
_IN_EVALUATION: dict[str, dict[str, Any]] = {
    "aten::dropout": {"train": False},
    "aten::feature_dropout": {"train": False},
    "aten::alpha_dropout": {"train": False},
    "aten::feature_alpha_dropout": {"train": False},
    "aten::native_dropout": {"train": False},
    "aten::rrelu": {"training": False},
    "aten::scaled_dot_product_attention": {"dropout_p": 0.0},
    "aten::batch_norm": {"training": False},
    "aten::lstm": {"train": False},
    "aten::gru": {"train": False},
    "aten::rnn_tanh": {"train": False},
    "aten::rnn_relu": {"train": False},
}
_COUNTER = "num_batches_tracked"


def set_dropout(graph_module: GraphModule, training: bool) -> bool:
    """Puts the literals of training or of evaluation into a captured graph, in place.

    Args:
        graph_module: A graph from `torch.export` of a module in training mode.
        training: Which of the two.

    Returns:
        Whether anything changed; a graph that is in that mode already is not recompiled.
    """
    any_changed = False
    for module in graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        changed = False
        for node in module.graph.nodes:
            changed |= _switch(node, training)
        if changed:
            module.recompile()
        any_changed |= changed
    return any_changed


def random_nodes(graph_module: GraphModule) -> list[Node]:
    """The nodes that draw random numbers in evaluation too, and whose result is read."""
    drawing = []
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            live = _read(module)
            drawing += [node for node in module.graph.nodes if node in live and _draws(node)]
    return drawing


def _draws(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    return node.target._schema.name.rstrip("_") not in _IN_EVALUATION  # type: ignore[union-attr]


def _read(graph_module: GraphModule) -> set[Node]:
    """Nodes that the output depends on, and those that write to a tensor."""
    waiting = [
        node
        for node in graph_module.graph.nodes
        if node.op == "output"
        or getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    ]
    live = set(waiting)
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node not in live:
                live.add(node)
                waiting.append(node)
    return live


def remember_training(graph_module: GraphModule) -> None:
    """Notes the literals of training in `node.meta`, as `set_dropout` does at its first sight."""
    for module in graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                _training_literals(node)


def _switch(node: Node, training: bool) -> bool:
    literals = _training_literals(node)
    changed = False
    for key, (in_training, in_evaluation) in literals.items():
        literal = in_training if training else in_evaluation
        now = node.args[key] if isinstance(key, int) else node.kwargs[key]
        if now != literal or type(now) is not type(literal):
            if isinstance(key, int):
                node.update_arg(key, literal)
            else:
                node.update_kwarg(key, literal)
            changed = True
    return changed


def _training_literals(node: Node) -> dict[int | str, tuple[Any, Any]]:
    """{position or keyword of the literal: (in training, in evaluation)}, found once a node."""
    if node.op != "call_function" or not hasattr(node.target, "_schema"):
        return {}
    recorded: dict[int | str, tuple[Any, Any]] | None = node.meta.get(TRAINING_LITERALS)
    if recorded is not None:
        return recorded
    schema = node.target._schema
    literals: dict[int | str, tuple[Any, Any]] = {}
    in_evaluation = _IN_EVALUATION.get(schema.name.rstrip("_"), {})
    for index, argument in enumerate(schema.arguments):
        if argument.name not in in_evaluation:
            continue
        where: int | str = index if index < len(node.args) else argument.name
        if isinstance(where, str) and where not in node.kwargs:
            continue  # left at its default, which is the value in evaluation (dropout_p=0.0)
        value = node.args[where] if isinstance(where, int) else node.kwargs[where]
        if isinstance(value, bool | int | float) and value != in_evaluation[argument.name]:
            literals[where] = (value, in_evaluation[argument.name])
    if _counts_batches(node):
        literals[1] = (node.args[1], 0)
    if literals:
        node.meta[TRAINING_LITERALS] = literals
    return literals


def _counts_batches(node: Node) -> bool:
    """`num_batches_tracked.add_(1)` of a batch norm: it counts nothing in evaluation."""
    return (
        node.target._schema.name == "aten::add_"  # type: ignore[union-attr]
        and isinstance(node.args[0], Node)
        and node.args[0].op == "get_attr"
        and str(node.args[0].target).rpartition(".")[2] == _COUNTER
    )
