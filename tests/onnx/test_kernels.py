"""The table of CUDA kernels against the schemas of ONNX and ONNX Runtime."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi import _pybind_state as ort

from bone_fx.onnx.kernels import CONTRIB, cuda_kernels, typed_by, version_of, why_not_on_cuda
from bone_fx.onnx.torch_exporter import OPSET

BY_OPSET = {
    19: {"Equal", "Pad", "Size"},
    20: {"ConstantOfShape", "ReduceMax", "ReduceMin"},
    21: {"Flatten", "Identity", "If", "Loop", "Scan"},
    23: set(),
    24: {"Cast", "Reshape", "Shape", "Squeeze", "TopK", "Transpose", "Unsqueeze"},
}
FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def gaps(opset: int) -> set[str]:
    """Operators of the table without a kernel for their version in an opset."""
    found = set()
    for (domain, name), kernels in cuda_kernels().items():
        if domain == CONTRIB or not onnx.defs.has(name, opset, ""):
            continue
        if not any(kernel.takes(version_of(domain, name, opset)) for kernel in kernels):
            found.add(name)
    return found


def test_no_kernel_is_missing_in_the_opset_that_is_written() -> None:
    assert not gaps(OPSET)


@pytest.mark.parametrize("opset", BY_OPSET)
def test_later_opsets_have_gaps(opset: int) -> None:
    assert gaps(opset) - gaps(opset - 1) == BY_OPSET[opset]


def test_operators_and_dtypes_are_those_of_the_schemas() -> None:
    schemas: dict[tuple[str, str], list[Any]] = {}
    for schema in ort.get_all_operator_schema():
        schemas.setdefault((schema.domain, schema.name), []).append(schema)
    unknown = []
    for (domain, name), kernels in cuda_kernels().items():
        # The table also knows opsets later than those that this ONNX Runtime lists under a name.
        known = schemas.get((domain, name)) or [onnx.defs.get_schema(name, domain)]
        node = ir.node(name, [ir.Value(name=letter) for letter in "abc"], domain=domain)
        allowed = {kind for schema in known for kind in _kinds(schema, node)}
        unknown += [
            f"{name} {dtype.name}"
            for kernel in kernels
            for dtype in kernel.dtypes
            if f"tensor({dtype.name.lower()})" not in allowed
        ]
    assert not unknown


def _kinds(schema: Any, node: ir.Node) -> list[str]:
    value = typed_by(node)
    formals = schema.outputs if value is node.outputs[0] else schema.inputs
    place = 0 if value is node.outputs[0] else list(node.inputs).index(value)
    if place >= len(formals):
        return []
    formal = formals[place]
    letter = getattr(formal, "typeStr", None) or formal.type_str
    return next(
        (c.allowed_type_strs for c in schema.type_constraints if c.type_param_str == letter),
        [letter],
    )


def test_operators_have_cpu_kernels_too() -> None:
    """What a CUDA graph is made of can be verified on the CPU."""
    kernels = {
        (k.domain, k.op_name) for k in ort.get_registered_ep_kernel_defs("CPUExecutionProvider")
    }
    composed = {("", "HardSwish")}  # a function of other operators where it has no kernel
    assert not {key for key in cuda_kernels() if key not in kernels | composed}


@pytest.mark.parametrize(
    ("domain", "operator", "dtype", "opset", "reason"),
    [
        ("", "Cos", FLOAT, 18, None),
        ("", "Cos", HALF, 22, "no CUDA kernel for version 22"),
        ("", "ReduceMean", BRAIN, 18, "no CUDA kernel for bfloat16"),
        ("", "Clip", ir.DataType.INT64, 18, None),
        ("", "Clip", ir.DataType.INT32, 18, "no CUDA kernel for int32"),
        ("", "Range", HALF, 18, "no CUDA kernel for float16"),
        ("", "Mish", FLOAT, 18, "no CUDA kernel is known"),
        (CONTRIB, "GroupQueryAttention", BRAIN, 1, None),
        (CONTRIB, "GroupQueryAttention", FLOAT, 1, "no CUDA kernel for float"),
    ],
)
def test_reasons(
    domain: str, operator: str, dtype: ir.DataType, opset: int, reason: str | None
) -> None:
    node = ir.node(operator, [ir.Value(name="x")], domain=domain)
    assert why_not_on_cuda(node, dtype, opset) == reason


def test_attention_with_a_bias_is_not_taken() -> None:
    inputs = [ir.Value(name=f"x{place}") for place in range(11)]
    node = ir.node("GroupQueryAttention", inputs, domain=CONTRIB)
    assert why_not_on_cuda(node, HALF, 1) == "the CUDA kernel takes no attention_bias"
