"""Which operators ONNX Runtime has CUDA kernels for, by opset and dtype.

The table holds what exports are, and may come to be, made of. It was written from ONNX Runtime's
docs/OperatorKernels.md as it stood at commit 001d12d, before 1.31, and from `onnx.defs` of onnx
1.23. A later version has more kernels, so it refuses too much rather than too little: 1.31 fills
gaps of opset 19 and later. What is not in the table counts as missing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

CONTRIB = "com.microsoft"

DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "bool": ir.DataType.BOOL,
}


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Attributes:
        since: First version of the operator that the kernel is for.
        until: Last version; None for a kernel registered for `since` and later, which ONNX Runtime
            takes only for an operator whose own version is `since`
            (onnxruntime/core/framework/kernel_registry.cc).
        dtypes: Dtypes of the input that `_TYPED_BY` names.
    """

    since: int
    until: int | None
    dtypes: frozenset[ir.DataType]

    def takes(self, version: int) -> bool:
        """Whether ONNX Runtime finds this kernel for a version of the operator."""
        return version == self.since or (
            self.until is not None and self.since <= version <= self.until
        )


# Dtypes -> operators with the versions of their kernels, `13..` registered without an end.
_STANDARD = {
    "fp32 fp16 bf16 int32 int64 bool": """
        Cast 13..18 19..20 21..22 23..; Concat 13..; ConstantOfShape 9..; Expand 13..;
        Flatten 13..; Gather 13..; GatherElements 13..; Identity 13..13 14..18 19..;
        Reshape 13..13 14..18 19..20 21..22 23..; Scan 11..15 16..18 19..;
        ScatterElements 13..15 16..17 18..; ScatterND 13..15 16..17 18..;
        Shape 13..14 15..18 19..20 21..22 23..; Size 13..; Slice 13..; Split 13..17 18..;
        Squeeze 13..20 21..22 23..; TensorScatter 24..; Transpose 13..20 21..22 23..; Trilu 14..;
        Unsqueeze 13..20 21..22 23..
    """,
    "fp32 fp16 bf16 int64 bool": "GatherND 13..",
    "fp32 fp16 bf16 int32 int64": """
        Abs 13..; Add 13..13 14..; Div 13..13 14..; Max 12..12 13..; Min 12..12 13..; Mod 13..;
        Mul 13..13 14..; Neg 13..; Pow 13..14 15..; ReduceSum 13..; Sign 13..; Sub 13..13 14..;
        Tile 13..; Where 16..
    """,
    "fp32 fp16 bf16": """
        Attention 23..23 24..; AveragePool 22..; Conv 22..; Dropout 13..; Erf 13..; Exp 13..;
        Gelu 20..; Gemm 13..; HardSigmoid 22..; HardSwish 22..; IsInf 20..; IsNaN 13..19 20..;
        LayerNormalization 1..16 17..; MatMul 13..; RMSNormalization 23..; Relu 13..13 14..;
        RotaryEmbedding 23..; Sigmoid 13..; SimplifiedLayerNormalization 1..; Softmax 13..;
        Sqrt 13..; Sum 8..12 13..; Tanh 13..
    """,
    "fp32 fp16 int32 int64 bool": "Compress 11..; Equal 11..12 13..; NonZero 13..",
    "fp32 fp16 int32 int64": """
        CumSum 14..; Greater 9..12 13..; GreaterOrEqual 12..15 16..; Less 9..12 13..;
        LessOrEqual 12..15 16..; ReduceMax 1..17 18..; ReduceMin 1..17 18..; TopK 11..
    """,
    "fp32 fp16 int64": "Clip 12..12 13..; OneHot 11..",
    "fp32 fp16 int32": """
        ReduceL1 1..17 18..; ReduceL2 1..17 18..; ReduceMean 1..17 18..; ReduceProd 1..17 18..;
        Resize 13..17 18..18 19..
    """,
    "fp32 fp16 bool": "Pad 13..17 18..",
    "fp32 fp16": """
        ArgMax 13..; ArgMin 13..; AveragePool 11..18 19..21; BatchNormalization 14..14 15..;
        Ceil 13..; Conv 11..21; ConvTranspose 11..; Cos 7..; DepthToSpace 13..; Einsum 12..;
        Elu 6..; Floor 13..; GRU 14..; GlobalAveragePool 1..; GlobalMaxPool 1..;
        HardSigmoid 6..21; HardSwish 14..21; InstanceNormalization 6..; LSTM 14..; LeakyRelu 16..;
        Log 13..; LogSoftmax 13..; MaxPool 12..; PRelu 16..; RNN 14..; Reciprocal 13..;
        ReduceLogSum 1..17 18..; ReduceLogSumExp 1..17 18..;
        ReduceSumSquare 1..17 18..; Round 11..; Selu 6..; Sin 7..; Softplus 1..; Softsign 1..;
        SpaceToDepth 13..; ThresholdedRelu 10..
    """,
    "fp32 int32 int64": "EyeLike 9..; Range 11..",
    "fp32": "GridSample 16..19 20..21 22..; IsInf 10..19",
    "int64": "Loop 13..18 19..",
    "bool": "And 7..; If 13..18 19..; Not 1..; Or 7..; Xor 7..",
}
_CONTRIB = {
    "fp32 fp16 bf16": """
        BiasGelu 1..; FastGelu 1..; FusedMatMul 1..; GatherBlockQuantized 1..; Gelu 1..;
        MatMulNBits 1..; MoE 1..; MultiHeadAttention 1..; QuickGelu 1..; RotaryEmbedding 1..;
        SkipLayerNormalization 1..; SkipSimplifiedLayerNormalization 1..
    """,
    "fp16 bf16": "GroupQueryAttention 1..; QMoE 1..",
}

_TYPED_BY = {"OneHot": 2, "GatherBlockQuantized": 2, "Where": 1}
"""Place of the input whose dtype chooses the kernel, where it is not the first."""

_NOT_TAKEN = {
    (CONTRIB, "GroupQueryAttention"): {10: "attention_bias"}  # cuda/bert/group_query_attention.cc
}
"""Inputs that a CUDA kernel refuses when it runs."""


def _kernels(domain: str, rows: dict[str, str]) -> Iterator[tuple[tuple[str, str], Kernel]]:
    for names, operators in rows.items():
        dtypes = frozenset(DTYPES[name] for name in names.split())
        for operator in operators.split(";"):
            name, *ranges = operator.split()
            for versions in ranges:
                since, until = versions.split("..")
                yield (domain, name), Kernel(int(since), int(until) if until else None, dtypes)


@functools.cache
def cuda_kernels() -> dict[tuple[str, str], tuple[Kernel, ...]]:
    """The table: domain and operator -> its kernels."""
    table: dict[tuple[str, str], tuple[Kernel, ...]] = {}
    for key, kernel in (*_kernels("", _STANDARD), *_kernels(CONTRIB, _CONTRIB)):
        table[key] = (*table.get(key, ()), kernel)
    return table


@functools.cache
def version_of(domain: str, operator: str, opset: int) -> int:
    """The operator's own version in an opset: 1 for those of ONNX Runtime."""
    try:
        return int(onnx.defs.get_schema(operator, opset, domain).since_version)
    except onnx.defs.SchemaError:
        return 1


def typed_by(node: ir.Node) -> ir.Value | None:
    """The value whose dtype chooses a node's kernel."""
    if node.op_type == "ConstantOfShape" or not node.inputs:
        return node.outputs[0]
    place = _TYPED_BY.get(node.op_type, 0)
    return node.inputs[place] if place < len(node.inputs) else None


def why_not_on_cuda(node: ir.Node, dtype: ir.DataType | None, opset: int) -> str | None:
    """Why a node has no CUDA kernel; None if it has.

    Args:
        node: The node.
        dtype: Dtype of the value that `typed_by` names; None if it is not known, which any kernel
            of the operator then takes.
        opset: Version of the node's domain that the model imports.
    """
    kernels = cuda_kernels().get((node.domain, node.op_type), ())
    if not kernels:
        return "no CUDA kernel is known"
    version = version_of(node.domain, node.op_type, opset)
    fitting = [kernel for kernel in kernels if kernel.takes(version)]
    if not fitting:
        return f"no CUDA kernel for version {version}"
    if dtype is not None and not any(dtype in kernel.dtypes for kernel in fitting):
        return f"no CUDA kernel for {dtype.name.lower()}"
    for place, name in _NOT_TAKEN.get((node.domain, node.op_type), {}).items():
        if place < len(node.inputs) and node.inputs[place] is not None:
            return f"the CUDA kernel takes no {name}"
    return None
