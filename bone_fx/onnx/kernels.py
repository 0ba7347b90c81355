"""Which operators have CUDA kernels in ONNX Runtime, and which nodes would not run there.

The table holds the operators that exports are made of, with the float dtypes of their kernels up to
opset 18, after ONNX Runtime's docs/OperatorKernels.md. What it does not hold counts as missing.
"""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

LATEST_OPSET = 18
"""The table is right up to this opset; later ones have other gaps."""

_ALL = frozenset({"fp32", "fp16", "bf16"})
_NO_BF16 = frozenset({"fp32", "fp16"})

_STANDARD_ALL = """
    Abs Add Cast Ceil Concat Constant ConstantOfShape Div Erf Exp Expand Flatten Gather
    GatherElements GatherND Gemm Identity LayerNormalization MatMul Max Min Mul Neg Not And Or Xor
    Pow ReduceSum Relu Reshape ScatterElements ScatterND Shape Sigmoid SimplifiedLayerNormalization
    Size Slice Softmax Split Sqrt Squeeze Sub Tanh Tile Transpose Unsqueeze Where
"""
_STANDARD_NO_BF16 = """
    ArgMax ArgMin AveragePool Clip Conv Cos CumSum Einsum Elu Equal Floor GlobalAveragePool Greater
    GreaterOrEqual LeakyRelu Less LessOrEqual Log LogSoftmax NonZero OneHot Pad Range Reciprocal
    ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd Round Selu Sign Sin Softplus TopK Trilu
"""
_CONTRIB_ALL = """
    FusedMatMul GatherBlockQuantized MatMulNBits MoE MultiHeadAttention RotaryEmbedding
    SkipSimplifiedLayerNormalization
"""
_CONTRIB_NO_BF16 = "BiasGelu FastGelu Gelu QuickGelu SkipLayerNormalization"

CUDA_KERNELS: dict[tuple[str, str], frozenset[str]] = {
    **{("", name): _ALL for name in _STANDARD_ALL.split()},
    **{("", name): _NO_BF16 for name in _STANDARD_NO_BF16.split()},
    **{("com.microsoft", name): _ALL for name in _CONTRIB_ALL.split()},
    **{("com.microsoft", name): _NO_BF16 for name in _CONTRIB_NO_BF16.split()},
    ("com.microsoft", "GroupQueryAttention"): frozenset({"fp16", "bf16"}),
}
"""Domain and operator -> float dtypes with a CUDA kernel."""

# Kernels for integers or booleans beside the floats that a row names.
_INTEGERS_TOO = frozenset(
    {"CumSum", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Range", "ReduceMax"}
)


def without_cuda_kernel(model: ir.Model, dtype: str) -> dict[str, int]:
    """Operators of a graph that ONNX Runtime would leave to the CPU, with the number of nodes.

    Left out are computations on shapes alone, which ONNX Runtime keeps on the CPU by design.

    Args:
        model: A translated model.
        dtype: Dtype of its activations: `fp32`, `fp16` or `bf16`.
    """
    shapes: set[ir.Value] = set()
    missing: Counter[str] = Counter()
    for node in model.graph:
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type in ("Shape", "Size") or (
            any(value in shapes for value in inputs)
            and all(value in shapes or value.is_initializer() for value in inputs)
        ):
            shapes.update(node.outputs)
            continue
        dtypes = CUDA_KERNELS.get((node.domain, node.op_type), frozenset())
        if dtype not in dtypes and not (dtypes and node.op_type in _INTEGERS_TOO):
            missing[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
    return dict(sorted(missing.items()))
