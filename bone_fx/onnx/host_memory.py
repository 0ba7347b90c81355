"""Which inputs and outputs of ONNX Runtime's CUDA kernels stand in host memory.

A kernel declares them (`InputMemoryType(OrtMemTypeCPUInput, …)`, `OutputMemoryType` in the sources
under onnxruntime/core/providers/cuda and contrib_ops/cuda of ORT 1.31); all others are on the
device, and a value on the wrong side is copied before the node runs.
"""

from __future__ import annotations

import onnx_ir as ir

from bone_fx.onnx.kernels import CONTRIB

_INPUTS = {
    0: "ConstantOfShape Range",
    1: """Clip CumSum Expand OneHot Pad Range Reshape Resize Slice Split Squeeze Tile TopK Trilu
       Unsqueeze ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
       ReduceProd ReduceSum ReduceSumSquare""",
    2: "Clip Dropout OneHot Pad Range Resize Slice",
    3: "Pad Resize Slice",
    4: "Slice",
}
"""Place of an input -> standard operators."""

_READ = frozenset(
    {
        *(("", name, place) for place, names in _INPUTS.items() for name in names.split()),
        ("", "Dropout", 1),
        (CONTRIB, "GroupQueryAttention", 6),
    }
)
_SIZES = frozenset({("", "Shape"), ("", "Size")})
_WAITS = frozenset({"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"})


def reads_on_host(node: ir.Node, place: int) -> bool:
    """Whether a CUDA kernel wants the input at this place in host memory."""
    return (node.domain, node.op_type, place) in _READ


def gives_sizes(node: ir.Node) -> bool:
    """Whether a node reads nothing but the shape of its input, and gives it on the host."""
    return (node.domain, node.op_type) in _SIZES


def waits_for_device(node: ir.Node) -> bool:
    """Whether a CUDA kernel must know values of the device before the next node can start."""
    return node.domain == "" and node.op_type in _WAITS
