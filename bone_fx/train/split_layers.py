"""Split: one submodule a layer, mounted where the model had it and owning its parameters.

Before:  %w = get_attr[model.layers.0.mlp.up_proj.weight]
         %y = aten.linear(%x, %w) ... %z = aten.add(%y, %x)
After:   %z = call_module[model.layers.0](%x, ...)

A layer is an element of the outermost module list that a node's `nn_module_stack` names. What a
module list's element reads besides its own parameters becomes an argument; parameters and buffers
keep their names. Left as they are: a module that is called more than once, and one that cannot be
cut out without moving a write or a random draw.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx

from bone_fx.graphs import adopt_state, attribute_at, container
from bone_fx.train.called_graph import LayerGraph

# They give back their input, or a view of it, without saying so in their schema.
_MAY_ALIAS = {"reshape", "contiguous", "to", "flatten", "type_as", "expand_as", "float"}


def split_in_place(gm: fx.GraphModule, kind: type[LayerGraph] = LayerGraph) -> None:
    """Split a graph into one `call_module` a layer; parameters stay the same objects.

    It comes last: passes see no sites in the result.
    """
    groups = layer_groups(gm)
    unit = {node: path for path, nodes in groups.items() for node in nodes}
    outputs = {
        path: [n for n in nodes if any(unit.get(user) != path for user in n.users)]
        for path, nodes in groups.items()
    }
    graph = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    now: dict[fx.Node, Any] = {}
    for item in _ordered(gm.graph, groups, unit):
        if isinstance(item, str):
            _call_layer(gm, graph, item, groups[item], outputs[item], now, kind)
        elif item.op == "output":
            graph.output(fx.map_arg(item.args[0], lambda n: now[n])).meta.update(item.meta)
        else:
            now[item] = graph.node_copy(item, lambda n: now[n])
    graph._codegen = gm.graph._codegen
    gm.graph = graph


def layers_of(gm: fx.GraphModule) -> dict[str, LayerGraph]:
    """The layers of a split graph by their path, in the order in which they run."""
    called = [str(node.target) for node in gm.graph.nodes if node.op == "call_module"]
    modules = {path: gm.get_submodule(path) for path in called}
    return {path: module for path, module in modules.items() if isinstance(module, LayerGraph)}


def layer_groups(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes of every layer that can be cut out, by the layer's path."""
    unit: dict[fx.Node, str] = {}
    calls: dict[str, set[str]] = defaultdict(set)
    for node in gm.graph.nodes:
        layer = _layer(node)
        if layer is not None:
            key, path = layer
            calls[path].add(key)
            unit[node] = path
    unit = {node: path for node, path in unit.items() if len(calls[path]) == 1}
    _adopt_constants(gm.graph, unit)
    for path in dict.fromkeys(unit.values()):
        if not _close(gm.graph, path, unit):
            unit = {node: other for node, other in unit.items() if other != path}
    while True:
        groups: dict[str, list[fx.Node]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node in unit:
                groups[unit[node]].append(node)
        groups = {p: nodes for p, nodes in groups.items() if any(n.op != "get_attr" for n in nodes)}
        unit = {node: path for path, nodes in groups.items() for node in nodes}
        try:
            _ordered(gm.graph, groups, unit)
        except _Cycle as cycle:
            unit = {node: path for node, path in unit.items() if path != cycle.path}
            continue
        return groups


class _Cycle(Exception):  # noqa: N818 - found and handled here
    def __init__(self, path: str) -> None:
        self.path = path


def _layer(node: fx.Node) -> tuple[str, str] | None:
    """Key (one a call) and path of the outermost element of a list that a node stands in."""
    if node.op in ("placeholder", "output", "get_attr"):
        return None
    for key, entry in (node.meta.get("nn_module_stack") or {}).items():
        path = str(entry[0])
        if path.rpartition(".")[2].isdigit():
            return key, path
    return None


def _adopt_constants(graph: fx.Graph, unit: dict[fx.Node, str]) -> None:
    """A layer's own parameters, and what stands nowhere and is read in one layer only."""
    for node in reversed(graph.nodes):
        readers = {unit.get(user) for user in node.users}
        path = next(iter(readers)) if len(readers) == 1 else None
        if path is None or node in unit or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            inside = str(node.target).startswith(f"{path}.")
            if inside or _is_region(graph, node):
                unit[node] = path
        elif not any(str(entry[0]) for entry in _stack(node)):
            unit[node] = path


def _stack(node: fx.Node) -> list[tuple[str, Any]]:
    entries = (node.meta.get("nn_module_stack") or {}).values()
    return [e for e in entries if "_empty_nn_module_stack" not in str(e[0])]


def _is_region(graph: fx.Graph, node: fx.Node) -> bool:
    """Whether a node reads the graph of a higher-order operator."""
    assert graph.owning_module is not None
    return isinstance(attribute_at(graph.owning_module, str(node.target)), fx.GraphModule)


def _close(graph: fx.Graph, path: str, unit: dict[fx.Node, str]) -> bool:
    """Take in what lies between nodes of a layer; False if the layer cannot be cut out."""
    nodes = list(graph.nodes)
    places = [i for i, node in enumerate(nodes) if unit.get(node) == path]
    working = [i for i in places if nodes[i].op != "get_attr"]
    if not working:
        return False
    span = nodes[working[0] : working[-1] + 1]
    after: set[fx.Node] = set()
    for node in span:
        if unit.get(node) == path or any(n in after for n in node.all_input_nodes):
            after.add(node)
    before: set[fx.Node] = set()
    for node in reversed(span):
        if unit.get(node) == path or any(n in before for n in node.users):
            before.add(node)
    for node in span:
        if unit.get(node) == path:
            continue
        if node in after and node in before:
            if node in unit:
                return False
            unit[node] = path
        elif _has_effect(node):
            return False
    return True


def _has_effect(node: fx.Node) -> bool:
    """Whether a node writes somewhere or draws random numbers: it must stay where it is."""
    schema = getattr(node.target, "_schema", None)
    tags = getattr(node.target, "tags", ())
    return (schema is not None and schema.is_mutable) or (torch.Tag.nondeterministic_seeded in tags)


def _ordered(
    graph: fx.Graph, groups: dict[str, list[fx.Node]], unit: dict[fx.Node, str]
) -> list[fx.Node | str]:
    """Nodes and layers in an order in which each comes after what it reads, near the old one."""
    order: list[fx.Node | str] = [node for node in graph.nodes if node.op == "placeholder"]
    done = set(order)
    for first in graph.nodes:
        if first in unit and first.op == "get_attr":
            continue  # a trace reads parameters at its top: their layer starts where it works
        waiting: list[fx.Node | str] = [unit.get(first, first)]
        opened: set[fx.Node | str] = set()
        while waiting:
            item = waiting[-1]
            if item in done:
                waiting.pop()
                continue
            members = groups[item] if isinstance(item, str) else [item]
            needed = [unit.get(n, n) for m in members for n in m.all_input_nodes]
            missing = [n for n in dict.fromkeys(needed) if n != item and n not in done]
            if not missing:
                done.add(item)
                order.append(item)
                waiting.pop()
            elif item in opened:
                raise _Cycle(next(i for i in (item, *missing) if isinstance(i, str)))
            else:
                opened.add(item)
                waiting += reversed(missing)
    return order


def _call_layer(
    gm: fx.GraphModule,
    graph: fx.Graph,
    path: str,
    nodes: list[fx.Node],
    outputs: list[fx.Node],
    now: dict[fx.Node, Any],
    kind: type[LayerGraph],
) -> None:
    """Make the layer's own graph, mount it, and call it in the outer graph."""
    inner = fx.Graph(tracer_cls=gm.graph._tracer_cls)
    within: dict[fx.Node, fx.Node] = {}
    mine = set(nodes)
    inputs = list(dict.fromkeys(n for m in nodes for n in m.all_input_nodes if n not in mine))
    for node in inputs:
        within[node] = inner.placeholder(node.name)
        within[node].meta.update({k: v for k, v in node.meta.items() if k == "val"})
    owner, leaf = container(gm, f"{path}.state")
    for node in nodes:
        copied = inner.node_copy(node, lambda n: within[n])
        if node.op in ("get_attr", "call_module"):
            copied.target = _name_inside(gm, owner, path, str(node.target))
        within[node] = copied
    results = tuple(within[n] for n in outputs)
    inner.output(results if len(results) != 1 else results[0])
    layer = kind(owner, inner, kind.__name__)
    adopt_state(layer, owner)
    layer.training = gm.training
    layer.recomputable = not any(_writes_outside(node, mine) for node in nodes)
    parent, leaf = container(gm, path)
    parent._modules[leaf] = layer
    call = graph.call_module(path, tuple(now[n] for n in inputs))
    if len(outputs) == 1:
        now[outputs[0]] = call
        call.meta.update({k: v for k, v in outputs[0].meta.items() if k == "val"})
        return
    for index, node in enumerate(outputs):
        now[node] = graph.call_function(operator.getitem, (call, index))
        now[node].meta.update({k: v for k, v in node.meta.items() if k == "val"})


def _name_inside(gm: fx.GraphModule, owner: torch.nn.Module, path: str, name: str) -> str:
    """The name of an attribute from inside its layer; a subgraph moves there."""
    if name.startswith(f"{path}."):
        return name.removeprefix(f"{path}.")
    leaf = name.replace(".", "_")
    if leaf not in owner._modules:
        owner.add_module(leaf, gm.get_submodule(name))
        holder, last = container(gm, name)
        del holder._modules[last]
    return leaf


def _writes_outside(node: fx.Node, mine: set[fx.Node]) -> bool:
    """Whether a node writes to what its layer was given, or to a buffer."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    if schema.name.startswith("aten::batch_norm"):
        return True  # running statistics, which the schema does not say
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        written = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if isinstance(written, fx.Node) and not _is_fresh(written, mine):
            return True
    return False


def _is_fresh(node: fx.Node, mine: set[fx.Node]) -> bool:
    """Whether a tensor was made in the layer, and is no view of one that was not."""
    while node in mine and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return False
        aliases = any(result.alias_info is not None for result in schema.returns)
        if not aliases and schema.name.partition("::")[2] not in _MAY_ALIAS:
            return True
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node):
            return False
        node = source
    return False
