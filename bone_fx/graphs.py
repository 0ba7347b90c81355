"""Copies of traced graphs, dotted names in their module trees, and small edits of both."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import fx, nn

from bone_fx.errors import UsageError


class ParameterHolder(nn.Module):
    """A place in a module tree that owns parameters; a graph reads them, and nothing calls it.

    So a hook on it would never fire, and is refused.
    """

    def _refuse_hook(self, *_args: Any, **_options: Any) -> Any:
        raise UsageError(
            "a hook on a part of a traced model would never fire: the graph reads its parameters, "
            "and does not call it",
            expected="a module that is called: the adapted module itself, one of its "
            "layer_modules(), or a part of the model that merge_and_unload() gives",
            next_step="ask the call for output_hidden_states=True, or register the hook on one of "
            "those",
        )

    register_forward_hook = _refuse_hook
    register_forward_pre_hook = _refuse_hook
    register_full_backward_hook = _refuse_hook
    register_full_backward_pre_hook = _refuse_hook
    register_backward_hook = _refuse_hook


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy to work on: its own graph, module tree and `Parameter` objects over the same storage.

    Every parameter and buffer keeps its name, tied names stay tied, persistence and parameters that
    the graph does not read are kept. Submodules that the graph calls are copied over the same
    storage too. The copy is not compiled: `recompile` it before it is called.
    """
    root = nn.Module()
    for name, _ in gm.named_modules(remove_duplicate=False):
        container(root, f"{name}.state" if name else "state")
    memo: dict[int, Any] = computed_tensors(gm)
    for name, parameter in gm.named_parameters(remove_duplicate=False):
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(
                parameter.detach(), requires_grad=parameter.requires_grad
            )
        owner, leaf = container(root, name)
        owner.register_parameter(leaf, memo[id(parameter)])
    for prefix, module in gm.named_modules(remove_duplicate=False):
        for leaf, buffer in module._buffers.items():
            lasting = leaf not in module._non_persistent_buffers_set
            if lasting and buffer is not None:  # statistics that a training forward writes
                memo.setdefault(id(buffer), buffer.clone())
            buffer = memo.setdefault(id(buffer), buffer)
            owner, _ = container(root, f"{prefix}.{leaf}" if prefix else leaf)
            owner.register_buffer(leaf, buffer, persistent=lasting)
    graph = copy_graph(gm.graph)
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        target = str(node.target)
        value = attribute_at(gm, target)
        owner, leaf = container(root, target)
        if isinstance(value, nn.Module):
            setattr(owner, leaf, copy.deepcopy(value, memo))
        elif not hasattr(owner, leaf):
            setattr(owner, leaf, value)
    # With an empty graph first: each assignment of a graph compiles it.
    copied = fx.GraphModule(root, fx.Graph(), type(gm).__name__)
    copied._graph, graph.owning_module = graph, copied
    adopt_state(copied, root)
    copied.meta.update(gm.meta)
    copied.train(gm.training) if type(gm).train is nn.Module.train else None
    return copied


def computed_tensors(module: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: tensors that hooks keep in a module, as weight norm does.

    They are computed from parameters, which torch does not copy; the copy computes its own.
    """
    return {
        id(value): value.detach()
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with its node names, meta and code generator."""
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    copies: dict[fx.Node, fx.Node] = {}
    value, old = cast(
        "tuple[Any, fx.Node]",
        copied.graph_copy(graph, val_map=cast("Any", copies), return_output_node=True),
    )
    copied.output(value, type_expr=getattr(old, "type", None)).meta.update(old.meta)
    for node, twin in copies.items():
        if twin.name != node.name:  # such as `input`, that Python has too and which got a number
            twin.name = node.name
    copied._codegen = graph._codegen
    return copied


def attribute_at(root: nn.Module, name: str) -> Any:
    """What a dotted name leads to, such as the tensor that a `get_attr` node reads, or None."""
    value: object = root
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def container(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a dotted name and the leaf name.

    Plain containers are made where there are none.
    """
    *path, leaf = name.split(".")
    for part in path:
        child = getattr(root, part, None)
        if not isinstance(child, nn.Module):
            child = ParameterHolder()
            root.add_module(part, child)
        root = child
    return root, leaf


def adopt_state(module: nn.Module, root: nn.Module) -> None:
    """Make a module tree the module's own, in place of the one it has."""
    for table in ("_modules", "_parameters", "_buffers"):
        setattr(module, table, getattr(root, table))
    module._non_persistent_buffers_set = root._non_persistent_buffers_set


def ancestors(node: fx.Node, most: int | None = None) -> list[fx.Node] | None:
    """The nodes that a node is computed from, itself included, in the graph's order.

    Args:
        node: The node.
        most: Number of nodes beyond which the answer is None.
    """
    nodes, waiting = {node}, [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - nodes
        nodes |= new
        waiting += new
        if most is not None and len(nodes) > most:
            return None
    return [n for n in node.graph.nodes if n in nodes]


def erase_unread(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nobody reads, and what nobody reads then, random draws included."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.users or node._erased or node.op in ("placeholder", "output"):
            continue
        waiting += node.all_input_nodes
        graph.erase_node(node)


def fake_like(node: fx.Node, tensor: torch.Tensor) -> object | None:
    """A fake value for `meta["val"]` of a new constant, in the mode of a node that has one.

    None if the trace has none.
    """
    mode = getattr(node.meta.get("val"), "fake_mode", None)
    return None if mode is None else mode.from_tensor(tensor, static_shapes=True)
