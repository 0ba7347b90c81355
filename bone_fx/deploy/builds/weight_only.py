"""Which quantized products CUDA's fast kernels take, and why they do not take the others.

ONNX Runtime 1.31 has three ways for `MatMulNBits` on CUDA (`docs/contrib_ops/cuda/matmul_nbits.md`
of its sources, sections 3 to 6):

1. weight-only kernels (fpA_intB), for a step and for a prefill, if the session asks for them and
   the product is one that they were built for;
2. a fused kernel, for a few tokens at a time;
3. the whole weight dequantized, and cuBLAS: in every run.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from bone_fx.deploy.options import FORMS

SESSION_OPTIONS = {
    "ep.cuda.fpa_intb_gemm": "1",
    # The kernels' own layout is a copy; without this the arena keeps the room of the first one.
    "session.use_device_allocator_for_initializers": "1",
}
"""What a session that runs at least one such product is to be opened with."""

_BLOCK_SIZE = 32
_OUTPUTS = {4: 64, 8: 32}
"""Bits of a code -> what the number of outputs has to be a multiple of."""
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FUSED_OUTPUTS, _LARGEST_FUSED_BLOCK = 8, {4: 128, 8: 256}
_UNUSED = {3: "zero points", 4: "reordered inputs (g_idx)", 5: "a bias"}
"""Inputs that a product of the weight-only kernels does not have, by their place."""


@dataclass(frozen=True)
class WeightOnly:
    """The quantized products of a graph, as CUDA runs them.

    Attributes:
        products: How many weights they have.
        refused: Why the weight-only kernels do not take one, by the name of its weight.
        slow: Names of the weights that are dequantized in every run.
    """

    products: int
    refused: dict[str, str]
    slow: tuple[str, ...]

    @property
    def session_options(self) -> dict[str, str]:
        """Options of a session that runs the graph; none if no product gains from them."""
        return SESSION_OPTIONS if self.products > len(self.refused) else {}

    def entries(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "products": self.products,
            "eligible": self.products - len(self.refused),
            "refused": self.refused,
            "session_options": self.session_options,
        }

    def notes(self) -> list[str]:
        """What a person should know: one sentence a reason, not one a product."""
        form = FORMS["cuda"]
        better = f"--block-size {form.block_size} --symmetric"
        reasons = Counter(why for name, why in self.refused.items() if name not in self.slow)
        return [
            *(
                f"{count} of {self.products} quantized products are not for CUDA's fast prefill "
                f"kernels: {why} (the default, {better}, is for them)"
                for why, count in reasons.items()
            ),
            *(
                f"{count} of {self.products} quantized products are slow on CUDA, in every step "
                f"their weights are dequantized: {why}"
                for why, count in Counter(self.refused[name] for name in self.slow).items()
            ),
        ]


def weight_only_products(graph: ir.Graph) -> WeightOnly:
    """Hold every `MatMulNBits` of a graph to the rule of the weight-only kernels."""
    products = [node for node in graph if node.op_type == "MatMulNBits"]
    reasons = {_weight_of(node): why_refused(node) for node in products}
    return WeightOnly(
        len(reasons),
        {name: why for name, why in reasons.items() if why is not None},
        tuple(_weight_of(node) for node in products if not _is_fused(node)),
    )


def why_refused(product: ir.Node) -> str | None:
    """Why the weight-only kernels do not take a product; None if they do."""
    bits, size, outputs, inputs = _sizes(product)
    scales = product.inputs[2]
    assert scales is not None
    if scales.dtype not in _HALVES:
        return "activations are in neither fp16 nor bf16"
    if any(value is None or not value.is_initializer() for value in product.inputs[1:3]):
        return "the weight is not constant"
    if bits not in _OUTPUTS:
        return f"{bits} bits"
    if size != _BLOCK_SIZE:
        return f"blocks of {size} values, not {_BLOCK_SIZE}"
    for place, what in _UNUSED.items():
        if len(product.inputs) > place and product.inputs[place] is not None:
            return what
    if outputs % _OUTPUTS[bits]:
        return f"{outputs} outputs, no multiple of {_OUTPUTS[bits]}"
    return f"{inputs} inputs, no multiple of {size}" if inputs % size else None


def _is_fused(product: ir.Node) -> bool:
    """Whether one of the kernels for a few tokens takes a product as it lies."""
    bits, size, outputs, inputs = _sizes(product)
    whole = outputs % _FUSED_OUTPUTS == 0 and inputs % _FUSED_OUTPUTS == 0
    return whole and size <= _LARGEST_FUSED_BLOCK.get(bits, 0)


def _sizes(product: ir.Node) -> tuple[int, int, int, int]:
    """Bits, values of a block, outputs and inputs."""
    bits, size, outputs, inputs = (
        product.attributes[name].as_int() for name in ("bits", "block_size", "N", "K")
    )
    return bits, size, outputs, inputs


def _weight_of(product: ir.Node) -> str:
    codes = product.inputs[1]
    assert codes is not None
    return str(codes.name).partition(".codes")[0]
