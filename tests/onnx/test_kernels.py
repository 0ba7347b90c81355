"""The table of CUDA kernels against schemas and against ONNX Runtime's own library of kernels."""

from __future__ import annotations

import importlib.util
import mmap
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnxruntime.capi import _pybind_state as ort

from bone_fx.onnx.kernels import (
    CONTRIB,
    DTYPES,
    cuda_kernels,
    typed_by,
    version_of,
    why_not_on_cuda,
)
from bone_fx.onnx.torch_exporter import OPSET

GAPS = {
    22: {
        *("Dropout", "Elu", "EyeLike", "InstanceNormalization", "MaxPool", "Selu"),
        "ThresholdedRelu",
    }
}
"""Operators whose newest kernel is for an earlier version than the opset's."""
ONLY_CUDA = {
    *("GatedDeltaNet", "MatMulBlockQuantizedFp4Weight", "MatMulBlockQuantizedFp8Weight"),
    *("PackedMultiHeadAttention", "PagedAttention", "SparsePagedAttention"),
}
"""Operators without a CPU kernel, which no export is made of yet."""
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


@pytest.mark.parametrize("opset", range(19, 25))
def test_gaps_of_later_opsets(opset: int) -> None:
    assert gaps(opset) - gaps(opset - 1) == GAPS.get(opset, set())


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
    missing = {key for key in cuda_kernels() if key not in kernels | composed}
    assert missing == {(CONTRIB, name) for name in ONLY_CUDA}


@pytest.mark.parametrize(
    ("domain", "operator", "dtype", "opset", "reason"),
    [
        ("", "Cos", FLOAT, 18, None),
        ("", "Cos", BRAIN, 18, "no CUDA kernel for bfloat16"),
        ("", "Cos", BRAIN, 22, None),
        ("", "Elu", HALF, 22, "no CUDA kernel for version 22"),
        ("", "ReduceMean", BRAIN, 18, None),
        ("", "ReduceMax", BRAIN, 18, "no CUDA kernel for bfloat16"),
        ("", "Reshape", ir.DataType.UINT8, 18, None),
        ("", "Reshape", ir.DataType.INT4, 18, "no CUDA kernel for int4"),
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


def attention(places: Iterable[int], **attributes: Any) -> ir.Node:
    inputs = [ir.Value(name=f"x{place}") if place in places else None for place in range(12)]
    return ir.node("GroupQueryAttention", inputs, attributes, domain=CONTRIB)


def test_attention_takes_a_bias_alone() -> None:
    bias, sink = 10, 11
    refused = "the CUDA kernel takes no attention_bias beside "
    assert why_not_on_cuda(attention([0, bias], smooth_softmax=0), HALF, 1) is None
    assert why_not_on_cuda(attention([0, sink]), HALF, 1) is None
    assert why_not_on_cuda(attention([0, bias, sink]), HALF, 1) == refused + "head_sink"
    for name, value in {"smooth_softmax": 1, "v_quant_type": "PER_TENSOR"}.items():
        node = attention([0, bias], **{name: value})
        assert why_not_on_cuda(node, HALF, 1) == refused + name
    assert why_not_on_cuda(attention([0], qk_output=1), HALF, 1) is not None


Classes = dict[str, set[tuple[str, ...]]]

TYPES = {
    "d": "fp64", "f": "fp32", "NS_9MLFloat16E": "fp16", "6__half": "fp16", "NS_8BFloat16E": "bf16",
    "a": "int8", "s": "int16", "i": "int32", "l": "int64", "NS_10Int4x2BaseILb1EEE": "int4",
    "h": "uint8", "t": "uint16", "j": "uint32", "m": "uint64", "NS_10Int4x2BaseILb0EEE": "uint4",
    "NS_12Float8E4M3FNE": "e4m3", "NS_14Float8E4M3FNUZE": "e4m3z", "NS_10Float8E5M2E": "e5m2",
    "NS_14Float8E5M2FNUZE": "e5m2z", "NS_12Float4E2M1x2E": "fp4", "b": "bool",
}  # fmt: skip
"""Types as the names of C++ classes spell them."""
TYPE = re.compile("|".join([*map(re.escape, TYPES), r"S\d*_"]))
INSIDE = re.compile(rb"[\w*]")
POOL = re.compile("NS_\\d+(AveragePool|MaxPool)")
VARIADIC = "21VariadicElementwiseOpINS0_24variadic_elementwise_ops"
GATHER_ND = rb"_ZN11onnxruntime4cuda15_GatherNDKernelI(\w+?)EEv"

CLASSES = {
    ("", "BatchNormalization"): "cuda::BatchNorm",
    ("", "GlobalAveragePool"): "cuda::AveragePool",
    ("", "GlobalMaxPool"): "cuda::MaxPool",
    ("", "GridSample"): "contrib::cuda::GridSample",
    ("", "Identity"): "cuda::IdentityOp",
    ("", "InstanceNormalization"): "cuda::InstanceNorm",
    ("", "LayerNormalization"): "cuda::LayerNorm",
    ("", "LogSoftmax"): "cuda::Softmax",
    ("", "LpNormalization"): "cuda::LpNorm",
    ("", "OneHot"): "cuda::OneHotOp",
    ("", "RMSNormalization"): "cuda::RMSNorm",
    ("", "ReverseSequence"): "cuda::ReverseSequenceOp",
    ("", "ScatterND"): "cuda::ScatterNDWithAtomicReduction",
    ("", "SimplifiedLayerNormalization"): "cuda::LayerNorm",
    ("", "Split"): "cuda::Split_18",
    (CONTRIB, "FusedMatMul"): "cuda::MatMul",
    (CONTRIB, "Gelu"): "cuda::Gelu",
    (CONTRIB, "SkipLayerNormalization"): "contrib::cuda::SkipLayerNorm",
    (CONTRIB, "SkipSimplifiedLayerNormalization"): "contrib::cuda::SkipLayerNorm",
}
"""Classes of kernels that do not bear their operator's name."""
PLACES = {"DequantizeLinear": 1, "GatherBlockQuantized": 1, "OneHot": 1, "QuantizeLinear": 1}
"""Place of the class's argument that the operator is typed by, where it is not the first."""
NO_CLASS = {"Shape", "Size"}
"""Their kernels are those of the CPU, which read no elements."""
NOT_BY_CLASS = {
    *("BiasGelu", "Clip", "Compress", "Concat", "ConstantOfShape", "CumSum", "DepthToSpace"),
    *("Dropout", "Einsum", "Expand", "EyeLike", "Flatten", "Gather", "GatherElements", "Identity"),
    *("If", "IsInf", "IsNaN", "Loop", "MatMulBlockQuantizedFp4Weight", "Mod", "Pow", "QMoE"),
    *("MatMulBlockQuantizedFp8Weight", "Range", "Reshape", "ReverseSequence", "Scan", "Size"),
    *("ScatterElements", "ScatterND", "Shape", "Slice", "SpaceToDepth", "Split", "Squeeze"),
    *("TensorScatter", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze"),
}
"""Operators with one class of kernel for all dtypes, which the document alone tells."""
MORE_IN_CLASS = {
    "GlobalAveragePool": {"bf16"},
    "GlobalMaxPool": {"int8", "uint8"},
    "LogSoftmax": {"bf16"},
}
"""What a class that belongs to another operator too has for that one alone."""


def classes_in(path: Path) -> Classes:
    """Classes of kernels in ONNX Runtime's CUDA library, by the names that it keeps of them.

    Returns:
        Class -> the dtypes among its arguments, one tuple for each variant that is compiled.
    """
    classes: Classes = defaultdict(set)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = re.finditer(rb"N11onnxruntime((?:7contrib)?4cuda)(\d\w+)\0", data)
        whole = (match for match in found if not INSIDE.match(data, match.start() - 1))
        names = {match.groups() for match in whole}
        gathers = {match[1].decode() for match in re.finditer(GATHER_ND, data)}
    for scope, name in names:
        key, arguments = _parsed(name.decode())
        key = f"contrib::cuda::{key}" if b"contrib" in scope else f"cuda::{key}"
        classes[key] |= arguments
    classes["cuda::GatherND"] = {(TYPES[dtype],) for dtype in gathers}  # the class has the index's
    return classes


def _parsed(name: str) -> tuple[str, set[tuple[str, ...]]]:
    variadic = name.startswith(VARIADIC)
    name = name.removeprefix(VARIADIC)
    digits = "".join(takewhile(str.isdigit, name))
    end = len(digits) + int(digits)
    key, rest = name[len(digits) : end], name[end:].removeprefix("EJ" if variadic else "I")
    dtypes: list[str] = []
    while match := TYPE.match(rest):
        dtypes.append(TYPES.get(match[0]) or dtypes[-1])
        rest = rest[match.end() :]
    if key == "Pool" and (pool := POOL.match(rest)):
        key = pool[1]
    return key, {(dtype,) for dtype in dtypes} if variadic else {tuple(dtypes)}


@pytest.fixture(scope="module")
def library() -> Classes:
    spec = importlib.util.find_spec("onnxruntime.capi")
    assert spec
    assert spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0]) / "libonnxruntime_providers_cuda.so"
    if sys.platform != "linux":
        pytest.skip("onnxruntime-gpu has this library for Linux only")
    assert path.exists(), (
        "onnxruntime-gpu is a dependency: was plain onnxruntime installed over it?"
    )
    return classes_in(path)


def class_of(key: tuple[str, str]) -> str:
    domain, name = key
    return CLASSES.get(key, f"contrib::cuda::{name}" if domain else f"cuda::{name}")


def test_each_operator_has_a_class_in_the_library(library: Classes) -> None:
    missing = {key[1] for key in cuda_kernels() if class_of(key) not in library}
    assert missing == NO_CLASS


def test_dtypes_are_those_of_the_library(library: Classes) -> None:
    """Each operator over all its versions, which the library does not tell apart."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    table, found = {}, {}
    for key, kernels in cuda_kernels().items():
        place = PLACES.get(key[1], 0)
        variants = library.get(class_of(key), set())
        found[key] = {dtypes[place] for dtypes in variants if len(dtypes) > place}
        table[key] = {names[dtype] for kernel in kernels for dtype in kernel.dtypes}
    assert {name for (_, name), dtypes in found.items() if not dtypes} == NOT_BY_CLASS
    differing = {key[1]: table[key] ^ found[key] for key in table if found[key]}
    assert {name: dtypes for name, dtypes in differing.items() if dtypes} == MORE_IN_CLASS


@pytest.mark.parametrize(
    ("domain", "operator", "input_place", "place", "opset"),
    [
        ("", "DequantizeLinear", 0, 0, 21),
        (CONTRIB, "GatherBlockQuantized", 0, 0, 1),
        (CONTRIB, "GroupQueryAttention", 3, 1, 1),
        (CONTRIB, "PagedAttention", 3, 1, 1),
        (CONTRIB, "SparsePagedAttention", 3, 1, 1),
    ],
)
def test_second_dtypes_are_those_of_the_library(
    domain: str, operator: str, input_place: int, place: int, opset: int, library: Classes
) -> None:
    """What is stored in fewer bits than it is computed in."""
    variants = library[class_of((domain, operator))]
    found = {(dtypes[1 - place], dtypes[place]) for dtypes in variants}
    computed = {first for first, _ in found}
    inputs = [ir.Value(name=letter) for letter in "abcd"]
    node = ir.node(operator, inputs, domain=domain)
    taken = set()
    for second, dtype in DTYPES.items():
        inputs[input_place].dtype = dtype
        taken |= {
            (first, second)
            for first in computed
            if why_not_on_cuda(node, DTYPES[first], opset) is None
        }
    own = {(first, first) for first in computed}  # by the schema no weights, but a cache
    assert taken - own == found - own
