"""Where the nodes of a graph run in a session for CUDA.

ONNX Runtime keeps on the CPU what computes with shapes alone, whatever kernels there are
(`GetCpuPreferredNodes`, onnxruntime/core/framework/fallback_cpu_capability.cc): these are numbers
that later nodes read on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from bone_fx.errors import ExportError
from bone_fx.onnx.cleanup.infer_dtypes import inferred_dtype
from bone_fx.onnx.kernels import CONTRIB, typed_by, why_not_on_cuda

SHAPES = "computes with shapes alone, which ONNX Runtime keeps on the CPU"

_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_MADE_CONSTANT = frozenset({"Constant"})  # an initializer once the model is loaded
_NAMED = 5


@dataclass
class Placement:
    """Where the nodes of a graph run.

    Attributes:
        on_cuda: Number of nodes with a CUDA kernel.
        shapes: Name -> operator of the nodes that compute with shapes alone.
        missing: Name -> operator and reason of the nodes that have no CUDA kernel.
    """

    on_cuda: int = 0
    shapes: dict[str, str] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """What the manifest says: every node that is not on CUDA by its name."""
        return {"on_cuda": self.on_cuda, "on_cpu": self.shapes, "reason_on_cpu": SHAPES}

    def require_kernels(self, next_step: str) -> None:
        """Refuses a graph with nodes that would run on the CPU.

        Raises:
            ExportError: There are such nodes; it names them and says `next_step`.
        """
        if not self.missing:
            return
        named = [
            f"{operator} ({name}): {reason}" for name, (operator, reason) in self.missing.items()
        ]
        more = [f"and {len(named) - _NAMED} more"] if len(named) > _NAMED else []
        raise ExportError(
            "nodes of the graph would leave CUDA for the CPU",
            expected="a CUDA kernel for every node",
            found="; ".join([*named[:_NAMED], *more]),
            next_step=next_step,
        )


def place(model: ir.Model) -> Placement:
    """Looks every node up by the dtype of its own input.

    Args:
        model: A translated model.
    """
    placement = Placement()
    dtypes: dict[ir.Value, ir.DataType | None] = {}
    shapes: set[ir.Value] = set()
    opsets = model.graph.opset_imports
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for index, output in enumerate(node.outputs):
            dtypes[output] = output.dtype or _dtype(node, index, dtypes)
        if (node.domain, node.op_type) in {("", name) for name in _MADE_CONSTANT}:
            continue
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        name = str(node.name or node.outputs[0].name)
        if _is_on_shapes(node, shapes, dtypes):
            shapes.update(node.outputs)
            placement.shapes[name] = operator
            continue
        value = typed_by(node)
        dtype = None if value is None else dtypes.get(value, value.dtype)
        reason = why_not_on_cuda(node, dtype, opsets.get(node.domain, 1))
        if reason is None:
            placement.on_cuda += 1
        else:
            placement.missing[name] = (operator, reason)
    return placement


def _is_on_shapes(
    node: ir.Node, shapes: set[ir.Value], dtypes: Mapping[ir.Value, ir.DataType | None]
) -> bool:
    if node.domain == "" and node.op_type in ("Shape", "Size"):
        return True
    if any(dtypes[output] in _HALVES for output in node.outputs):
        return False
    inputs = [value for value in node.inputs if value is not None]
    return any(value in shapes for value in inputs) and all(
        value in shapes or value.is_initializer() for value in inputs
    )


def _dtype(
    node: ir.Node, index: int, dtypes: Mapping[ir.Value, ir.DataType | None]
) -> ir.DataType | None:
    """The dtype of an output, whose type is forgotten once a graph is cleaned up."""

    def dtype_of(value: ir.Value) -> ir.DataType | None:
        return dtypes.get(value) or value.dtype

    if node.domain == CONTRIB or node.op_type == "SimplifiedLayerNormalization":
        inputs = [dtype_of(value) for value in node.inputs if value is not None]
        return next((d for d in inputs if d is not None and d.is_floating_point()), None)
    return inferred_dtype(node, index, dtype_of)
