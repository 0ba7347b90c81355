"""Expands the layers that were traced as one node by copying the layer that they equal.

Before:
    entered: LayerEntry(hidden, past_0) path=layers.0
    y:       linear(entered, layers.0.weight)
    left:    LayerExit(y, present_0) path=layers.0
    z:       Layer(left, past_1) of=layers.0 path=layers.1

After:
    y:       linear(hidden, layers.0.weight)
    z:       linear(y, layers.1.weight)

What is copied stands behind the entry and depends on it, on a parameter of the layer or on its
past; all else belongs to every layer and is shared, or is copied too where layers are to be whole.
A graph without such nodes is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import SymInt
from torch.fx import Graph, Node

from bone_fx.errors import PassError
from bone_fx.lower.symbolic import SINGLE, attributes, is_operator, operands
from bone_fx.passes.frame import Outcome

DOMAIN = "bone_fx"
ENTRY, EXIT, LAYER = "LayerEntry", "LayerExit", "Layer"


def stamp(graph: Graph, constants: Mapping[str, str], *, whole: bool = False) -> Outcome:
    """Expands every `Layer` and removes the marks around the traced ones.

    Args:
        graph: The graph.
        constants: The name of the parameter or buffer that a placeholder stands for, by the
            placeholder's name.
        whole: Whether a layer has copies of all that stands in it.
    """
    entries = _by_path(graph, ENTRY)
    exits = _by_path(graph, EXIT)
    layers = [node for node in graph.nodes if is_operator(node, DOMAIN, LAYER)]
    if not entries and not exits and not layers:
        return Outcome(modified=False)
    for path in entries.keys() - exits.keys():  # a layer that cannot be repeated
        _remove(graph, entries.pop(path))
    placeholders = {
        constants[n.name]: n for n in graph.nodes if n.op == "placeholder" and n.name in constants
    }
    owned: dict[str, list[str]] = {}
    regions: dict[str, list[Node]] = {}
    for node in layers:
        former = str(attributes(node)["of"])
        if former not in regions:
            owned[former] = [n for n in placeholders if n.startswith(f"{former}.")]
            own = None if whole else {placeholders[name] for name in owned[former]}
            regions[former] = _region(graph, entries[former], exits[former], own)
        path = str(attributes(node)["path"])
        twins = {}
        for name in owned[former]:
            twin = placeholders.get(path + name.removeprefix(former))
            if twin is None:
                raise PassError(f"layer {path} has no constant like {name}")
            twins[placeholders[name]] = twin
        _expand(graph, node, entries[former], exits[former], regions[former], twins)
    for mark in (*entries.values(), *exits.values()):
        _remove(graph, mark)
    return Outcome(modified=True)


def every_layer_written(graph: Graph) -> Node | None:
    """Requires that `stamp` has run; gives the first layer that is still one node."""
    return next((node for node in graph.nodes if is_operator(node, DOMAIN, LAYER)), None)


def _remove(graph: Graph, mark: Node) -> None:
    hidden = operands(mark)[0]
    assert hidden is not None
    mark.replace_all_uses_with(hidden)
    graph.erase_node(mark)


def _by_path(graph: Graph, kind: str) -> dict[str, Node]:
    return {str(attributes(n)["path"]): n for n in graph.nodes if is_operator(n, DOMAIN, kind)}


def _region(graph: Graph, entry: Node, leaving: Node, own: set[Node] | None) -> list[Node]:
    """The nodes of a layer, in order: behind its entry, needed by its exit, and its own.

    These depend on the entry or on constants of its own; None for all that stands between the two.
    Sizes are the same in every layer.
    """
    nodes = list(graph.nodes)
    behind = nodes[nodes.index(entry) + 1 : nodes.index(leaving)]
    if own is None:
        return [node for node in behind if not isinstance(node.meta.get("val"), SymInt)]
    depends = {entry, *own, *(n for n in operands(entry)[1:] if n is not None)}
    for node in behind:
        if any(n in depends for n in node.all_input_nodes):
            depends.add(node)
    needed = {n for n in operands(leaving) if n is not None}
    for node in reversed(behind):
        if node in needed:
            needed.update(node.all_input_nodes)
    return [node for node in behind if node in depends and node in needed]


def _expand(
    graph: Graph,
    layer: Node,
    entry: Node,
    leaving: Node,
    region: list[Node],
    twins: dict[Node, Node],
) -> None:
    hidden, *pasts = operands(layer)
    of, path = str(attributes(layer)["of"]), str(attributes(layer)["path"])
    instead: dict[Node, Node | None] = {**twins, entry: hidden}
    instead.update(zip((n for n in operands(entry)[1:] if n is not None), pasts, strict=True))
    with graph.inserting_before(layer):
        for node in region:
            copied = graph.node_copy(node, lambda n: instead.get(n) or n)
            copied.meta = {**node.meta, **_stack_of(node, of, path)}
            instead[node] = copied
    results = [instead.get(n, n) for n in operands(leaving) if n is not None]
    if layer.target == SINGLE:
        assert results[0] is not None
        layer.replace_all_uses_with(results[0])
    for user in list(layer.users):
        if user.target is not operator.getitem:
            raise PassError(f"layer {path} is read whole by {user.name}")
        result = results[user.args[1]]  # type: ignore[index]  # the index of a getitem
        assert result is not None
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(layer)


def _stack_of(node: Node, of: str, path: str) -> dict[str, Any]:
    """The modules that a copied node belongs to."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return {}
    copied = {}
    for key, (owner, *kind) in stack.items():
        if f"{owner}.".startswith(f"{of}."):
            key, owner = key.replace(of, path, 1), path + owner.removeprefix(of)
        copied[key] = (owner, *kind)
    return {"nn_module_stack": copied}
