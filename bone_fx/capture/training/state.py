"""The state of a captured graph: the model's own tensors under the model's own names."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from bone_fx.graphs import attribute_at


def mount_state(graph_module: GraphModule, model: torch.nn.Module) -> None:
    """Replaces all state of `graph_module` by the model's parameters and buffers, not copied.

    Names, their order, tied aliases and which buffers are persistent become the model's, so that
    the two have equal `state_dict()`s. Constants that the trace made stay, as buffers that are not
    persistent, and so do the graphs of higher-order operators.
    """
    subgraphs = {k: m for k, m in graph_module._modules.items() if isinstance(m, GraphModule)}
    state_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    state_names |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    constants: dict[str, torch.Tensor] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if node.target not in state_names and node.target.partition(".")[0] not in subgraphs:
            value = attribute_at(graph_module, node.target)
            if isinstance(value, torch.Tensor):
                constants[node.target] = value
    for name in {target.partition(".")[0] for target in constants}:
        graph_module.__dict__.pop(name, None)
    graph_module._parameters.clear()
    graph_module._buffers.clear()
    graph_module._non_persistent_buffers_set.clear()
    graph_module._modules.clear()
    mirror_into(graph_module, model, {})
    for target, value in constants.items():
        *path, leaf = target.split(".")
        owner: torch.nn.Module = graph_module
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(leaf, value.detach(), persistent=False)
    for name, module in subgraphs.items():
        graph_module.add_module(name, module)


def mirror_into(
    target: torch.nn.Module, source: torch.nn.Module, seen: dict[int, torch.nn.Module]
) -> None:
    """Gives `target` the state of `source`, in modules of the same names; shared ones stay one."""
    seen[id(source)] = target
    for name, parameter in source._parameters.items():
        target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        target.register_buffer(
            name, buffer, persistent=name not in source._non_persistent_buffers_set
        )
    for name, child in source._modules.items():
        if child is None or not _has_state(child):
            continue
        if id(child) not in seen:
            mirror_into(torch.nn.Module(), child, seen)
        target.add_module(name, seen[id(child)])


def name_as_used(graph_module: GraphModule, model: torch.nn.Module) -> None:
    """Lets each use of a tied parameter read it under the name that the using module has for it.

    Before: get_attr[lm_head.weight] -> embedding, linear
    After:  get_attr[model.embed_tokens.weight] -> embedding;  get_attr[lm_head.weight] -> linear

    Both names are the same Parameter object, as in the model.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    graph = graph_module.graph
    for node in graph.find_nodes(op="get_attr"):
        names = aliases.get(id(parameters.get(node.target)), [])
        if len(names) < 2:
            continue
        for user in list(node.users):
            as_used = _name_in_module(user, names)
            if as_used is None or as_used == node.target:
                continue
            with graph.inserting_before(node):
                alias = graph.get_attr(as_used)
            alias.meta = dict(node.meta)
            user.replace_input_with(node, alias)
    _merge_reads(graph_module)


def _merge_reads(graph_module: GraphModule) -> None:
    """One get_attr a name, none without users."""
    first: dict[str, Node] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        if node.target in first and node.users:
            node.replace_all_uses_with(first[node.target])
        if not node.users:
            graph_module.graph.erase_node(node)
        else:
            first[node.target] = node


def _name_in_module(user: Node, names: list[str]) -> str | None:
    """The alias that belongs to the innermost module whose code made `user`."""
    stack = user.meta.get("nn_module_stack", {}).values()
    for path, _ in reversed(list(stack)):
        owner: str = path.partition("@")[0]
        for name in names:
            if name.rpartition(".")[0] == owner:
                return name
    return None


def _has_state(module: torch.nn.Module) -> bool:
    return any(m._parameters or m._buffers for m in module.modules())
