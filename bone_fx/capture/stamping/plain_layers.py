"""Equal layers of a model without a cache, traced once.

A layer is repeated if it turns one tensor into another; it may pass on what else it was given. One
that shares its parameters, that reads its number, or that is called again, is traced as it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager
from typing import Any

from torch import SymInt, Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from bone_fx.capture.stamping.keys import sizes, value_key, with_number
from bone_fx.capture.stamping.layer_number import LayerNumber
from bone_fx.capture.stamping.layers import (
    LayerList,
    forwards_replaced,
    hidden_argument,
    layer_lists,
    mark,
)
from bone_fx.lower.stamp import DOMAIN, ENTRY, EXIT, LAYER, stamp
from bone_fx.lower.symbolic import is_operator
from bone_fx.passes.frame import Frame


def equal_layers_once(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which a trace of a model has marks, for `write_layers_out` to expand."""
    return forwards_replaced([(layers, _Stamper(layers).call) for layers in layer_lists(model)])


def write_layers_out(program: ExportedProgram) -> None:
    """Write every layer of a traced program out, in place, with what it writes to its buffers."""
    names = {
        spec.arg.name: spec.target
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
        and spec.target is not None
        and isinstance(spec.arg, TensorArgument)
    }
    read = {
        argument
        for node in program.graph.nodes
        if any(is_operator(node, DOMAIN, kind) for kind in (ENTRY, LAYER, EXIT))
        for argument in node.all_input_nodes
    }
    Frame(program.graph).run(stamp, names, whole=True)
    _erase_sizes(program.graph, read)
    program.graph_module.recompile()


def _erase_sizes(graph: Graph, nodes: set[Node]) -> None:
    """Erase sizes that only the marks asked for, and what these were computed from."""
    while nodes:
        node = nodes.pop()
        is_size = node.op != "placeholder" and isinstance(node.meta.get("val"), SymInt)
        if is_size and not node.users:
            nodes.update(node.all_input_nodes)
            graph.erase_node(node)


class _Stamper:
    """Stands before the forward of each layer of a list."""

    def __init__(self, of: LayerList) -> None:
        self._of = of
        self._traced: dict[Hashable, tuple[int, Any, Tensor, object]] = {}
        self._called: set[int] = set()

    def call(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer between marks, or one node in its place."""
        layer, path = self._of.layers[index], self._of.paths[index]
        run = type(layer).forward
        hidden = hidden_argument(args, kwargs)
        if hidden is None or index in self._called:
            return run(layer, *args, **kwargs)
        self._called.add(index)
        others = pytree.tree_map(lambda x: None if x is hidden else x, (args, kwargs))
        key = (self._of.keys[index], value_key(others), sizes(hidden), hidden.dtype)
        if key in self._traced:
            former, output, result, _ = self._traced[key]
            node = mark(LAYER, (hidden,), path, like=result, of=self._of.paths[former])
            return pytree.tree_map(lambda x: node if x is result else x, output)
        entered = mark(ENTRY, (hidden,), path)
        args, kwargs = pytree.tree_map(lambda x: entered if x is hidden else x, (args, kwargs))
        number = LayerNumber(index)
        with with_number(layer, self._of.places, number):
            output = run(layer, *args, **kwargs)
        passed = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        made = [x for x in pytree.tree_leaves(output) if x is not None and id(x) not in passed]
        if number.read or len(made) != 1 or not isinstance(made[0], Tensor):
            return output
        left = mark(EXIT, (made[0],), path)
        output = pytree.tree_map(lambda x: left if x is made[0] else x, output)
        # What the key names by identity stays alive with it.
        self._traced[key] = (index, output, left, (others, hidden))
        return output
