"""The pasts of a decoder's layers: one pair of inputs for all layers of a shape while it is traced.

A model of a hundred layers has two hundred pasts, and each input costs a trace time. So a trace
sees one pair for each shape; a layer that is traced takes its own through a mark,
`Past(past) layer=7 kind=0`, and `spread_pasts` gives every layer its inputs and outputs.

Shape letters: B batch, K key/value heads, P past tokens, D head size.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.utils import _pytree as pytree

from bone_fx.lower.stamp import DOMAIN, LAYER
from bone_fx.lower.symbolic import MULTIPLE, attributes, is_operator, operands

PAST = "Past"
Pair = tuple[Tensor, Tensor]
NodePair = tuple[Node, Node]


class Pasts:
    """Past key and value of each layer, each [B, K, P, D].

    Args:
        pairs: The inputs of the trace.
        of: For each layer, which pair is like its own.
        shared: Whether layers share a pair, so that each takes its own through a mark.
    """

    def __init__(self, pairs: Sequence[Pair], of: Sequence[int], *, shared: bool) -> None:
        self._pairs = pairs
        self._of = of
        self._shared = shared
        self._marks: dict[int, Pair] = {}

    def __len__(self) -> int:
        return len(self._of)

    def like(self, layer: int) -> Pair:
        """A pair of the shapes and dtypes of a layer's own."""
        return self._pairs[self._of[layer]]

    def of_layer(self, layer: int) -> Pair:
        """The pair that belongs to one layer."""
        if not self._shared:
            return self.like(layer)
        if layer not in self._marks:
            key, value = self.like(layer)
            self._marks[layer] = (_mark(key, layer, 0), _mark(value, layer, 1))
        return self._marks[layer]


def _mark(past: Tensor, layer: int, kind: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{PAST}",
        (past,),
        {"layer": layer, "kind": kind},
        dtype=past.dtype,
        shape=past.shape,
        version=1,
    )


@dataclass(frozen=True)
class SharedPasts:
    """How the layers of a trace share its inputs.

    Attributes:
        of: For each layer, which pair of inputs is like its own.
        traced: The layers that have outputs, in their order.
    """

    of: list[int]
    traced: list[int]


def spread_pasts(program: ExportedProgram, shared: SharedPasts) -> None:
    """Give every layer its own pasts and presents, in place.

    Before:
        inputs:  input_ids, attention_mask, past key and value of each shape
        z:       Layer(hidden) of=layers.0 path=layers.1 layer=1
        outputs: logits, present key and value of each traced layer

    After:
        inputs:  input_ids, attention_mask, past key and value of each layer
        z, present_1: Layer(hidden, past_1) of=layers.0 path=layers.1 layer=1
        outputs: logits, present key and value of each layer

    Args:
        program: From a trace with shared pasts.
        shared: How they are shared.
    """
    pasts = _spread_inputs(program, shared.of)
    graph = program.graph
    logits, *traced = graph.output_node().args[0]
    presents: dict[int, Sequence[Node]] = {
        layer: traced[2 * place : 2 * place + 2] for place, layer in enumerate(shared.traced)
    }
    for node in list(graph.nodes):
        if is_operator(node, DOMAIN, PAST):
            where = attributes(node)
            node.replace_all_uses_with(pasts[int(where["layer"])][int(where["kind"])])  # type: ignore[arg-type]  # both are numbers
            graph.erase_node(node)
        elif is_operator(node, DOMAIN, LAYER):
            layer = int(attributes(node)["layer"])  # type: ignore[arg-type]  # it is a number
            presents[layer] = _with_past(node, pasts[layer])
    outputs = [logits, *(node for layer in range(len(pasts)) for node in presents[layer])]
    graph.output_node().args = (tuple(outputs),)
    graph.eliminate_dead_code()
    program.graph_signature.output_specs[:] = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=node.name), None) for node in outputs
    ]


def _spread_inputs(program: ExportedProgram, of: Sequence[int]) -> list[NodePair]:
    graph, specs = program.graph, program.graph_signature.input_specs
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    inputs = [spec for spec in specs if spec.kind == InputKind.USER_INPUT]
    shared = [placeholders[spec.arg.name] for spec in inputs[2:]]
    pasts: list[NodePair] = []
    with graph.inserting_before(shared[0]):
        for pair in of:
            new = [graph.placeholder(f"past_{len(pasts)}_{kind}") for kind in ("key", "value")]
            for node, like in zip(new, shared[2 * pair :], strict=False):
                node.meta = dict(like.meta)
            pasts.append((new[0], new[1]))
    for number, node in enumerate(shared):
        node.replace_all_uses_with(pasts[of.index(number // 2)][number % 2])
        graph.erase_node(node)
    gone = {node.name for node in shared}
    specs[:] = [spec for spec in specs if getattr(spec.arg, "name", None) not in gone]
    specs += [
        InputSpec(InputKind.USER_INPUT, TensorArgument(name=node.name), None)
        for pair_of_nodes in pasts
        for node in pair_of_nodes
    ]
    return pasts


def describe_call(program: ExportedProgram, layers: int) -> None:
    """Tells the program, which may be decomposed later, how it is called now."""
    (whole, *_), signature = program.module_call_graph, program.graph_signature
    assert whole.signature is not None
    pasts = [0] * (2 * layers)
    call = {"input_ids": 0, "attention_mask": 0, "past_key_values": pasts}
    whole.signature = replace(
        whole.signature,
        inputs=[s.arg for s in signature.input_specs if s.kind == InputKind.USER_INPUT],
        outputs=[],  # decomposition would lose those that are one output of several of a node
        in_spec=pytree.tree_structure(((), call)),
        out_spec=pytree.tree_structure((0, *pasts)),
    )


def _with_past(node: Node, pasts: NodePair) -> tuple[Node, Node]:
    """Replaces `Layer(hidden)`; returns its present key and value."""
    graph = node.graph
    kept = {key: value for key, value in node.kwargs.items() if key != "shape"}
    with graph.inserting_before(node):
        whole = graph.call_function(
            MULTIPLE, ([*operands(node), *pasts], LAYER, [1, 1, 1]), {**kept, "shapes": [[]] * 3}
        )
        whole.meta = dict(node.meta)
        hidden, key, value = (
            graph.call_function(operator.getitem, (whole, place)) for place in range(3)
        )
    hidden.meta = dict(node.meta)
    node.replace_all_uses_with(hidden)
    graph.erase_node(node)
    return key, value
