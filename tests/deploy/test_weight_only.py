"""Products that CUDA's weight-only kernels take, and what is said of the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bone_fx.deploy.builds.weight_only import SESSION_OPTIONS, weight_only_products
from bone_fx.deploy.options import FORMS

HALF = ir.DataType.FLOAT16
FITS: dict[str, Any] = {"bits": 4, "block_size": 32, "N": 192, "K": 160}


def constant(name: str, dtype: ir.DataType) -> ir.Value:
    tensor = ir.tensor(np.zeros((1, 1), dtype.numpy()), name=name)
    return ir.Value(
        name=name, const_value=tensor, shape=ir.Shape((1, 1)), type=ir.TensorType(dtype)
    )


def graph(
    *products: dict[str, Any], inputs: tuple[str, ...] = (), dtype: ir.DataType = HALF
) -> ir.Graph:
    """Products beside each other, with more inputs behind the scales."""
    x = ir.Value(name="x", type=ir.TensorType(dtype))
    nodes, constants = [], []
    for number, attributes in enumerate(products):
        codes = constant(f"w{number}.codes", ir.DataType.UINT8)
        own = [codes, constant(f"w{number}.scales", dtype)]
        own += [constant(f"w{number}.{name}", ir.DataType.UINT8) for name in inputs if name]
        constants += own
        rest = iter(own[2:])
        given = [x, *own[:2], *(next(rest) if name else None for name in inputs)]
        nodes.append(ir.node("MatMulNBits", given, attributes, domain="com.microsoft"))
    return ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=constants)


def test_products_of_both_widths() -> None:
    found = weight_only_products(graph(FITS, {**FITS, "bits": 8, "N": 96}))
    assert found.entries() == {
        "products": 2,
        "eligible": 2,
        "refused": {},
        "session_options": SESSION_OPTIONS,
    }
    assert found.notes() == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"N": 96}, "96 outputs, no multiple of 64"),
        ({"bits": 8, "N": 112}, "112 outputs, no multiple of 32"),
        ({"block_size": 16}, "blocks of 16 values, not 32"),
        ({"K": 168}, "168 inputs, no multiple of 32"),
        ({"bits": 2}, "2 bits"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], reason: str) -> None:
    found = weight_only_products(graph(FITS, {**FITS, **changes}))
    assert found.refused == {"w1": reason}
    assert found.session_options == SESSION_OPTIONS  # one product is enough
    alone = weight_only_products(graph({**FITS, **changes}))
    assert alone.session_options == {}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [(("zeros",), "zero points"), (("", "order"), "g_idx"), (("", "", "bias"), "a bias")],
)
def test_inputs_that_the_kernels_do_not_have(inputs: tuple[str, ...], reason: str) -> None:
    found = weight_only_products(graph(FITS, inputs=inputs))
    assert reason in found.refused["w0"]


def test_float32() -> None:
    refused = weight_only_products(graph(FITS, dtype=ir.DataType.FLOAT)).refused
    assert "neither fp16 nor bf16" in refused["w0"]


def test_one_sentence_a_reason_and_a_stronger_one_where_every_step_is_slow() -> None:
    small, large = {**FITS, "block_size": 16}, {**FITS, "block_size": 256, "K": 512}
    found = weight_only_products(graph(small, small, large, FITS))
    prefill, slow = found.notes()
    assert prefill.startswith("2 of 4 quantized products")
    assert "prefill" in prefill
    assert f"--block-size {FORMS['cuda'].block_size} --symmetric" in prefill
    assert "slow" not in prefill
    assert slow.startswith("1 of 4 quantized products are slow")
    assert "every step" in slow
    assert "blocks of 256" in slow


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({"block_size": 128}, False),
        ({"block_size": 256}, True),
        ({"bits": 8, "block_size": 256}, False),
        ({"N": 97}, True),
    ],
)
def test_products_that_are_dequantized_in_every_step(changes: dict[str, Any], slow: bool) -> None:
    found = weight_only_products(graph({**FITS, "K": 512, **changes}))
    assert found.slow == (("w0",) if slow else ())
