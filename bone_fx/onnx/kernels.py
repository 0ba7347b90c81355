"""Which operators ONNX Runtime has CUDA kernels for, by version and dtype.

The table holds what exports are, and may come to be, made of, for opsets 18 to 24 and what is known
of later ones. It was written from the CUDA section of ONNX Runtime's docs/OperatorKernels.md at
commit 004b79eda305a216ab8d0e21eabe81d7713eb768, and its dtypes are those of the library that
ONNX Runtime 1.31.1 ships: tests/onnx/test_kernels.py reads them out of the installed one. Versions
are not to be found in there. What is not in the table counts as missing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

CONTRIB = "com.microsoft"

DTYPES = {
    "fp64": ir.DataType.DOUBLE,
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "int8": ir.DataType.INT8,
    "int16": ir.DataType.INT16,
    "int32": ir.DataType.INT32,
    "int64": ir.DataType.INT64,
    "uint8": ir.DataType.UINT8,
    "uint16": ir.DataType.UINT16,
    "uint32": ir.DataType.UINT32,
    "uint64": ir.DataType.UINT64,
    "bool": ir.DataType.BOOL,
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e4m3z": ir.DataType.FLOAT8E4M3FNUZ,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "e5m2z": ir.DataType.FLOAT8E5M2FNUZ,
    "fp4": ir.DataType.FLOAT4E2M1,
}
_SETS = {
    "ieee": "fp64 fp32 fp16",
    "floats": "ieee bf16",
    "words": "int32 int64 uint32 uint64",
    "numbers": "floats int8 int16 uint8 uint16 words",
    "any": "numbers bool",  # all types of a fixed size
    "fp8": "e4m3 e4m3z e5m2 e5m2z",
}
"""Names for several dtypes."""


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
    "any": """
        Cast 13..18; Concat 13..; ConstantOfShape 9..20 21..22 23..24 25..;
        Expand 13..; Flatten 13..20 21..22 23..24 25..; Gather 13..; GatherElements 13..;
        Identity 13..13 14..18; Reshape 13..13 14..18; Scan 11..15 16..18;
        ScatterElements 13..15 16..17 18..; ScatterND 13..15 16..17 18..; Shape 13..14 15..18;
        Size 13..20 21..22 23..24 25..; Slice 13..; Split 13..17 18..;
        Squeeze 13..20 21..22 23..23 24..24 25..; TensorScatter 24..;
        Transpose 13..20 21..22 23..24 25..; Trilu 14..; Unsqueeze 13..20 21..22 23..23 24..24 25..
    """,
    "any fp8": """
        Identity 19..20 21..22 23..24 25..; Reshape 19..20 21..22 23..24 25..;
        Scan 19..20 21..22 23..24 25..; Shape 19..20 21..22 23..24 25..
    """,
    "any e4m3 e5m2": "Cast 19..20 21..22",
    "any e4m3 e5m2 fp4": "Cast 23..24 25..",
    "numbers": "Abs 13..; Add 14..; Div 14..; Mul 14..; Sign 13..; Sub 14..",
    "floats words": """
        Add 13..13; Div 13..13; Max 12..12 13..; Min 12..12 13..; Mod 13..; Mul 13..13; Sub 13..13
    """,
    "floats int8 int16 int32 int64 uint8": "TopK 24..",
    "floats int8 int16 int32 int64": "Neg 13..",
    "floats int32 int64 uint8": "Where 16..",
    "floats int32 int64": "Pow 13..14 15..; ReduceSum 13..; Tile 13..",
    "floats int64 bool": "GatherND 13..",
    "floats int32": "ReduceMean 1..17 18..",
    "floats fp8": "IsInf 20..; IsNaN 20..",
    "floats": """
        AveragePool 22..; Conv 22..; Cos 22..; DeformConv 22..; Dropout 13..; Erf 13..; Exp 13..;
        Gelu 20..; Gemm 13..; HardSigmoid 22..; HardSwish 22..; IsNaN 13..19;
        LayerNormalization 1..16 17..; MatMul 13..; RMSNormalization 23..; Relu 13..13 14..;
        RoiAlign 22..; Sigmoid 13..; SimplifiedLayerNormalization 1..; Sin 22..; Softmax 13..;
        Softplus 22..; Softsign 22..; Sqrt 13..; Sum 8..12 13..; Tanh 13..
    """,
    "fp32 fp16 bf16": "Attention 23..23 24..; LpNormalization 22..; RotaryEmbedding 23..",
    "ieee words bool": "Equal 11..12 13..18 19..",
    "ieee words": """
        CumSum 14..; Greater 9..12 13..; GreaterOrEqual 12..15 16..; Less 9..12 13..;
        LessOrEqual 12..15 16..
    """,
    "ieee int8 int16 uint8 uint16 words bool": """
        Compress 11..; ReverseSequence 10..
    """,  # and bfloat16, which ONNX allows in neither
    "ieee int8 int16 uint8 uint16 words": "Shrink 9..",
    "ieee int8 int16 int32 int64 uint8": "TopK 11..23",
    "ieee int8 int32 int64 uint8": "ReduceMax 1..17 18..19 20..; ReduceMin 1..17 18..19 20..",
    "ieee int8 int64 uint8 uint64": "Clip 12..12 13..",
    "ieee int32 uint8": "Resize 13..17 18..18 19..",
    "ieee int32": "ReduceL1 1..17 18..; ReduceL2 1..17 18..; ReduceProd 1..17 18..",
    "ieee int8 uint8": "MaxPool 12..",
    "ieee bool": "Pad 13..17 18..18 19..20 21..22 23..23 24..24 25..",
    "ieee": """
        ArgMax 13..; ArgMin 13..; AveragePool 11..18 19..21; BatchNormalization 14..14 15..;
        Ceil 13..; Conv 11..21; ConvTranspose 11..21 22..; Cos 7..21; DeformConv 19..21;
        DepthToSpace 13..; Einsum 12..; Elu 6..; Floor 13..; GRU 14..21 22..;
        GlobalAveragePool 1..21 22..; GlobalMaxPool 1..21 22..; HardSigmoid 6..21;
        HardSwish 14..21; InstanceNormalization 6..; LRN 13..; LSTM 14..21 22..; LeakyRelu 16..;
        Log 13..; LogSoftmax 13..; PRelu 16..; RNN 14..21 22..; Reciprocal 13..;
        ReduceLogSum 1..17 18..; ReduceLogSumExp 1..17 18..; ReduceSumSquare 1..17 18..;
        RoiAlign 16..21; Round 11..21 22..; Selu 6..; Sin 7..21; Softplus 1..21; Softsign 1..21;
        SpaceToDepth 13..; ThresholdedRelu 10..
    """,
    "fp32 fp16 int32 int64 uint8 bool": "NonZero 13..",
    "fp32 fp16 int64": "OneHot 11..",
    "fp32 fp16": """
        DequantizeLinear 19..20 21..22 23..24 25..; LpNormalization 1..21;
        QuantizeLinear 19..20 21..22 23..24 25..
    """,
    "fp64 fp32 int32 int64 uint64": "EyeLike 9..",
    "fp64 fp32 int16 int32 int64": "Range 11..26 27..",
    "fp64 fp32": "IsInf 10..19",
    "fp32": """
        DequantizeLinear 13..18; GridSample 16..19 20..21 22..; QuantizeLinear 13..18
    """,
    "int8": "MatMulInteger 10..",
    "int64": "Loop 13..18 19..20 21..22 23..24 25..",
    "bool": "And 7..; If 13..18 19..20 21..22 23..24 25..; Not 1..; Or 7..; Xor 7..",
}
_CONTRIB = {
    "floats": "BiasGelu 1..; FastGelu 1..; FusedMatMul 1..; Gelu 1..; QuickGelu 1..",
    "fp32 fp16 bf16": """
        Attention 1..; CausalConvWithState 1..; GatedDeltaNet 1..; GatedRMSNorm 1..;
        GatherBlockQuantized 1..; LinearAttention 1..; LinearAttentionGate 1..;
        MRotaryEmbedding 1..; MatMulNBits 1..; MoE 1..; MultiHeadAttention 1..;
        RotaryEmbedding 1..; SkipLayerNormalization 1..; SkipSimplifiedLayerNormalization 1..
    """,
    "fp16 bf16": """
        GroupQueryAttention 1..; MatMulBlockQuantizedFp4Weight 1..;
        MatMulBlockQuantizedFp8Weight 1..; PagedAttention 1..; QMoE 1..; SparseAttention 1..;
        SparsePagedAttention 1..
    """,  # the library has SparsePagedAttention, the document has not
    "fp32 fp16": "PackedMultiHeadAttention 1..",
}

_TYPED_BY = {"DequantizeLinear": 1, "GatherBlockQuantized": 2, "OneHot": 2, "Where": 1}
"""Place of the input whose dtype chooses the kernel, where it is not the first."""

_SECOND = {
    ("", "DequantizeLinear"): (0, "int8 uint8 int4 uint4 e4m3 e5m2"),
    (CONTRIB, "GatherBlockQuantized"): (0, "uint8 int4 uint4 fp8 fp4"),
    (CONTRIB, "GroupQueryAttention"): (3, "int8 uint8 e4m3"),  # the cache: uint8 holds int4
    (CONTRIB, "PagedAttention"): (3, "int8 uint8 e4m3"),
    (CONTRIB, "QMoE"): (2, "uint8 e4m3"),
    (CONTRIB, "SparsePagedAttention"): (3, "int8"),
}
"""Place of a second input whose dtype chooses the kernel, and what it may be beside the first's."""

_NOT_WITH_A_BIAS = ("k_quant_type", "v_quant_type", "sliding_window_cache", "smooth_softmax")
"""Attributes that GroupQueryAttention refuses beside an attention_bias."""


def dtypes_of(names: str) -> frozenset[ir.DataType]:
    """The dtypes that names of `DTYPES`, and of sets of them, stand for."""
    found: set[ir.DataType] = set()
    for name in names.split():
        found |= dtypes_of(_SETS[name]) if name in _SETS else {DTYPES[name]}
    return frozenset(found)


def _kernels(domain: str, rows: dict[str, str]) -> Iterator[tuple[tuple[str, str], Kernel]]:
    for names, operators in rows.items():
        dtypes = dtypes_of(names)
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
    return _input(node, _TYPED_BY.get(node.op_type, 0))


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
    allowed = frozenset.union(*(kernel.dtypes for kernel in fitting)) if dtype is None else {dtype}
    return _wrong_second(node, frozenset(allowed)) or _refused(node)


def _wrong_second(node: ir.Node, first: frozenset[ir.DataType]) -> str | None:
    place, names = _SECOND.get((node.domain, node.op_type), (0, ""))
    second = _input(node, place) if names else None
    if second is None or second.dtype is None or second.dtype in first | dtypes_of(names):
        return None
    return f"no CUDA kernel for {second.dtype.name.lower()} in input {place}"


def _refused(node: ir.Node) -> str | None:
    """What a kernel refuses when it runs (contrib_ops/cuda/bert/group_query_attention.cc).

    The one that adds a bias knows neither sinks nor caches that are quantized or hold a window.
    """
    if (node.domain, node.op_type) != (CONTRIB, "GroupQueryAttention"):
        return None
    used = [name for name, value in node.attributes.items() if value.value not in (0, -1, "NONE")]
    if "qk_output" in used:
        return "the CUDA kernel has no output_qk"
    if _input(node, 10) is None:
        return None
    beside = [name for name in _NOT_WITH_A_BIAS if name in used]
    if _input(node, 11) is not None:
        beside.append("head_sink")
    return f"the CUDA kernel takes no attention_bias beside {beside[0]}" if beside else None


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None
