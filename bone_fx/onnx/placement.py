"""Where the nodes of a graph run in a session for CUDA, and what is copied between the devices.

The rule is ONNX Runtime's own (`GetCpuPreferredNodes`,
onnxruntime/core/framework/fallback_cpu_capability.cc): what reads a value that stands in host
memory, and beside it nothing but such values, inputs of the graph and small constants, runs on the
CPU, unless its CUDA kernel wants that value on the host or a value of it is in half floats. So
shapes are computed there. Where a value is then on the wrong side, a copy is inserted
(`TransformerMemcpy`, onnxruntime/core/optimizer/transformer_memcpy.cc), and a graph with a copy
cannot be captured as a CUDA graph (onnxruntime/core/session/inference_session.cc).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from bone_fx.errors import ExportError, some
from bone_fx.onnx.cleanup.infer_dtypes import inferred_dtype
from bone_fx.onnx.host_memory import gives_sizes, reads_on_host, waits_for_device
from bone_fx.onnx.kernels import CONTRIB, typed_by, why_not_on_cuda

ON_SIZES = "computes with sizes alone, which ONNX Runtime keeps on the CPU"

_NARROW = frozenset(
    {
        *(ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
        *(ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2),
    }
)
_SMALL = 100
"""Values of a constant that does not keep a node on the device."""
_MADE_CONSTANT = "Constant"  # an initializer once the model is loaded


@dataclass
class Placement:
    """Where the nodes of a graph run.

    Attributes:
        on_cuda: Number of nodes that run on CUDA.
        on_cpu: Name -> operator of the nodes that ONNX Runtime keeps on the CPU.
        missing: Name -> operator and reason of the nodes that have no CUDA kernel.
        copies: The values that are copied between the devices, each with the node that wants it
            elsewhere.
        waiting: Name -> operator of the nodes that wait for values of the device, control flow
            among them.
        grows: Whether the cache is concatenated, so that its shape is another in every step.
    """

    on_cuda: int = 0
    on_cpu: dict[str, str] = field(default_factory=dict)
    missing: dict[str, tuple[str, str]] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    grows: bool = False

    def why_not_captured(self) -> str | None:
        """Why ONNX Runtime cannot capture the graph as a CUDA graph; None if it can."""
        if self.waiting:
            name, operator = next(iter(self.waiting.items()))
            return f"{operator} ({name}) waits for values of the device"
        if self.grows:
            return "the cache is concatenated, and another shape in every step"
        if self.copies:
            return f"a value is copied between CPU and GPU: {self.copies[0]}"
        return None

    def report(self) -> dict[str, Any]:
        """What the manifest says: every node that is not on CUDA by its name."""
        reason = self.why_not_captured()
        return {
            "on_cuda": self.on_cuda,
            "on_cpu": self.on_cpu,
            "reason_on_cpu": ON_SIZES,
            "memcpy": self.copies,
            "cuda_graph": "yes" if reason is None else f"no: {reason}",
        }

    def require_cuda_graph(self) -> None:
        """Refuses a graph that cannot be captured as a CUDA graph.

        Raises:
            ExportError: It cannot be captured; the message says why.
        """
        reason = self.why_not_captured()
        if reason is not None:
            raise ExportError(
                "the graph cannot be captured as a CUDA graph",
                found=reason,
                next_step="export without --cuda-graph",
            )

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
        raise ExportError(
            "nodes of the graph would leave CUDA for the CPU",
            expected="a CUDA kernel for every node",
            found=some(named, separator="; "),
            next_step=next_step,
        )


def place(model: ir.Model) -> Placement:
    """Looks every node up by the dtype of its own input, and follows the values between devices.

    Args:
        model: A translated model, its nodes in topological order.
    """
    placement = Placement()
    dtypes: dict[ir.Value, ir.DataType | None] = {}
    hosted: set[ir.Value] = set()
    opsets = model.graph.opset_imports
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for index, output in enumerate(node.outputs):
            dtypes[output] = output.dtype or _dtype(node, index, dtypes)
        if node.domain == "" and node.op_type == _MADE_CONSTANT:
            continue
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        name = str(node.name or node.outputs[0].name)
        value = typed_by(node)
        dtype = None if value is None else dtypes.get(value, value.dtype)
        reason = why_not_on_cuda(node, dtype, opsets.get(node.domain, 1))
        stays = _stays_on_cpu(node, hosted, dtypes)
        if waits_for_device(node):
            placement.waiting[name] = operator
        if stays:
            placement.on_cpu[name] = operator
        elif reason is not None:
            placement.missing[name] = (operator, reason)
        else:
            placement.on_cuda += 1
        is_on_cpu = stays or reason is not None
        placement.copies += _copies(node, name, hosted, is_on_cpu=is_on_cpu)
        if is_on_cpu or gives_sizes(node):
            hosted.update(node.outputs)
    return placement


def _stays_on_cpu(
    node: ir.Node, hosted: set[ir.Value], dtypes: Mapping[ir.Value, ir.DataType | None]
) -> bool:
    """Whether ONNX Runtime keeps a node on the CPU although CUDA may have a kernel for it."""
    inputs = [(place, value) for place, value in enumerate(node.inputs) if value is not None]
    if not any(value in hosted for _, value in inputs):
        return False
    for place, value in inputs:
        if dtypes.get(value, value.dtype) in _NARROW:
            return False
        if _is_constant(value):
            if value.const_value is not None and value.const_value.size > _SMALL:
                return False
        elif not value.is_graph_input() and (value not in hosted or reads_on_host(node, place)):
            return False
    return True


def _copies(node: ir.Node, name: str, hosted: set[ir.Value], *, is_on_cpu: bool) -> list[str]:
    """The inputs of a node that stand on the other side than it wants them.

    Constants are put where they are read when the model is loaded; an input of the graph is bound
    on the device.
    """
    copies = []
    for place, value in enumerate(node.inputs):
        if value is None or _is_constant(value):
            continue
        on_host = value in hosted
        if gives_sizes(node) or on_host == (is_on_cpu or reads_on_host(node, place)):
            continue
        way = "to the device" if on_host else "to the host"
        copies.append(f"{value.name} {way}, for {node.op_type} ({name})")
    return copies


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.is_initializer() or (
        producer is not None and producer.domain == "" and producer.op_type == _MADE_CONSTANT
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
