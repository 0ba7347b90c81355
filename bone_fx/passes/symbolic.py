"""Reading and rewriting the ONNX operators in a graph (`onnx_symbolic` nodes)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.onnx.ops  # registers the operators below
from torch.fx import Node

SINGLE = torch.ops.onnx_symbolic._symbolic.default
MULTIPLE = torch.ops.onnx_symbolic._symbolic_multi_out.default

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


def rewrite(node: Node, inputs: list[Node | None], values: Mapping[str, int | float]) -> None:
    """Gives the operator other inputs and other attributes (numbers only)."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    integers = [v for v in values.values() if isinstance(v, int)]
    floats = [v for v in values.values() if isinstance(v, float)]
    places, i, f = [], 0, 0
    for value in values.values():
        start = i if isinstance(value, int) else f
        places.append([start, start + 1])
        i, f = (i + 1, f) if isinstance(value, int) else (i, f + 1)
    node.update_arg(0, inputs)
    node.kwargs = {
        **node.kwargs,
        "attr_keys": list(values),
        "attr_types": ["i" if isinstance(v, int) else "f" for v in values.values()],
        "attr_pos": places,
        "attr_ints": integers,
        "attr_floats": floats,
        "attr_strs": [],
    }


def _sequence(node: Node, name: str) -> list[Any]:
    value = node.kwargs.get(name, [])
    assert isinstance(value, list | tuple)
    return list(value)
