"""Reading and rewriting the ONNX operators in a graph (`onnx_symbolic` nodes)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.onnx.ops  # registers the operators below
from torch import Tensor
from torch.fx import Graph, Node

SINGLE = torch.ops.onnx_symbolic._symbolic.default
MULTIPLE = torch.ops.onnx_symbolic._symbolic_multi_out.default

CONTRIB = "com.microsoft"
ONNX_DTYPES = {torch.float32: 1, torch.int32: 6, torch.int64: 7, torch.float16: 10}
ONNX_DTYPES |= {torch.float64: 11, torch.bfloat16: 16}
"""Codes of `onnx.TensorProto.DataType`."""

Attributes = dict[str, int | float | str | list[int] | list[float] | list[str]]


def is_operator(node: object, domain: str, op_type: str) -> bool:
    """Whether `node` is the operator `domain::op_type`."""
    return (
        isinstance(node, Node)
        and node.target in (SINGLE, MULTIPLE)
        and node.args[1] == op_type
        and node.kwargs.get("domain", "") == domain
    )


def operands(node: Node) -> list[Node | None]:
    """The inputs of the operator, None for those left out."""
    inputs = node.args[0]
    assert isinstance(inputs, list | tuple)
    return [i if isinstance(i, Node) else None for i in inputs]


def attributes(node: Node) -> Attributes:
    """The attributes of the operator by name."""
    single = {"i": "attr_ints", "f": "attr_floats", "s": "attr_strs"}
    read: dict[str, Any] = {}
    keys, types, places = (_sequence(node, k) for k in ("attr_keys", "attr_types", "attr_pos"))
    for key, kind, (start, end) in zip(keys, types, places, strict=True):
        values = _sequence(node, single[kind[0]])[start:end]
        read[key] = list(values) if kind.endswith("s") and len(kind) == 2 else values[0]
    return read


def rewrite(node: Node, inputs: list[Node | None], values: Mapping[str, int | float | str]) -> None:
    """Gives the operator other inputs and other attributes (numbers and strings)."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    kept: dict[str, list[int | float | str]] = {"i": [], "f": [], "s": []}
    kinds, places = [], []
    for value in values.values():
        kind = "s" if isinstance(value, str) else "i" if isinstance(value, int) else "f"
        kinds.append(kind)
        places.append([len(kept[kind]), len(kept[kind]) + 1])
        kept[kind].append(value)
    node.update_arg(0, inputs)
    node.kwargs = {
        **node.kwargs,
        "attr_keys": list(values),
        "attr_types": kinds,
        "attr_pos": places,
        "attr_ints": kept["i"],
        "attr_floats": kept["f"],
        "attr_strs": kept["s"],
    }


def insert_operator(
    graph: Graph,
    op_type: str,
    inputs: list[Node | None],
    values: Mapping[str, int | float | str],
    outputs: Sequence[Tensor],
    *,
    sizes_of: Node,
    domain: str = "",
) -> Node:
    """Inserts an operator with several outputs where the graph inserts.

    Args:
        graph: The graph.
        op_type: Name of the operator, version 1.
        inputs: Its inputs, None for those left out.
        values: Its attributes, numbers and strings.
        outputs: A (fake) tensor for each output; all have the leading dynamic sizes of `sizes_of`.
        sizes_of: A node from whose tensor dynamic sizes are read, axis by axis.
        domain: Domain of the operator.
    """
    size_nodes: dict[int, Node] = {}
    shapes = [
        [_size(graph, size, axis, sizes_of, size_nodes) for axis, size in enumerate(output.shape)]
        for output in outputs
    ]
    node = graph.call_function(
        MULTIPLE,
        (inputs, op_type, [ONNX_DTYPES[output.dtype] for output in outputs]),
        {"shapes": shapes, "domain": domain, "version": 1, **_NO_METADATA},
    )
    node.meta["val"] = tuple(outputs)
    rewrite(node, inputs, values)
    return node


_NO_METADATA: dict[str, list[str]] = {"metadata_props_keys": [], "metadata_props_values": []}


def _size(
    graph: Graph, size: int | torch.SymInt, axis: int, source: Node, size_nodes: dict[int, Node]
) -> int | Node:
    if isinstance(size, int):
        return size
    if axis not in size_nodes and (recorded := _said_size(source, axis)) is not None:
        size_nodes[axis] = recorded
    if axis not in size_nodes:
        size_nodes[axis] = graph.call_function(torch.ops.aten.sym_size.int, (source, axis))
        size_nodes[axis].meta["val"] = source.meta["val"].shape[axis]
    return size_nodes[axis]


def _said_size(source: Node, axis: int) -> Node | None:
    """The size that an operator was given for its output: reading it again costs nodes a layer."""
    if source.target is not operator.getitem:
        return None
    producer, index = source.args
    if not isinstance(producer, Node) or producer.target is not MULTIPLE:
        return None
    shapes: Any = producer.kwargs["shapes"]
    size = shapes[index][axis]
    return size if isinstance(size, Node) else None


def _sequence(node: Node, name: str) -> list[Any]:
    value = node.kwargs.get(name, [])
    assert isinstance(value, list | tuple)
    return list(value)
