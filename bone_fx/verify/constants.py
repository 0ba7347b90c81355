"""The written constants, bit for bit.

Each weight in the file is torch's own fold of the base's weight.

Logits hide a single layer's mistake where fp16 rounds it away; the bytes do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.onnx.packed_names import groups_of, parts_of
from bone_fx.passes.fold import fold_weight
from bone_fx.sites import LinearSite
from bone_fx.verify.reference import Adapters
from bone_fx.weights.recipes.reorder import row_order


def verify_constants(
    folder: Path, model: nn.Module, sites: Mapping[str, LinearSite], adapters: Adapters
) -> None:
    """Compare the adapted weights in a written model with torch's fold.

    Args:
        folder: The folder with `model.onnx`.
        model: The base in float32.
        sites: The adapted sites by name.
        adapters: Adapters by name, in the order in which they apply.

    Raises:
        VerificationError: A weight is missing or differs; the message names the layer.
    """
    constants = ir.load(folder / "model.onnx").graph.initializers
    codes = (name.removesuffix(".codes") for name in constants if name.endswith(".codes"))
    quantized = {part for name in codes for part in parts_of(name)}
    for name, site in sites.items():
        if site.weight_name in quantized:
            continue  # quantized: checked when it is loaded into the reference
        steps = [(a.config.method, a.blocks[name]) for _, a in adapters if name in a.blocks]
        weight = model.get_parameter(site.weight_name).detach()
        with torch.no_grad():
            expected = fold_weight(weight, steps, transposed=site.transposed, layer=name)
        actual = _written(constants, site.weight_name, model)
        if actual is None:
            raise VerificationError(
                f"{name}: the exported model has no constant {site.weight_name}"
            )
        expected = expected.to(actual.dtype)
        if not (_equal(actual, expected) or _equal(actual, expected.t())):
            base = weight.to(actual.dtype)
            what = (
                "the base weight, unfolded"
                if _equal(actual, base) or _equal(actual, base.t())
                else "other values"
            )
            raise VerificationError(
                f"verification failed: {name}: the written weight is not the folded one",
                expected="torch's fold, bit for bit",
                found=what,
                next_step="nothing was published; the build is kept as <output>.rejected",
            )


def _written(constants: Mapping[str, ir.Value], weight: str, model: nn.Module) -> Tensor | None:
    """A weight as it was written, alone or as a part of a packed constant; None if it is not."""
    for name, value in constants.items():
        plain = name.removesuffix(".T")
        parts = parts_of(plain)
        if weight not in parts or value.const_value is None:
            continue
        packed = _tensor(value.const_value)
        if (groups := groups_of(plain)) is not None:
            return _regrouped(packed, row_order(*groups))
        if len(parts) == 1:
            return packed
        rows = [model.get_parameter(part).shape[0] for part in parts]
        axis = 0 if packed.shape[0] == sum(rows) and packed.shape[1] != sum(rows) else 1
        place = parts.index(weight)
        return packed.narrow(axis, sum(rows[:place]), rows[place])
    return None


def _regrouped(weight: Tensor, order: Tensor) -> Tensor:
    """A weight in the order of the model's rows."""
    axis = 0 if weight.shape[0] == len(order) and weight.shape[-1] != len(order) else 1
    return torch.empty_like(weight).index_copy_(axis, order, weight)


def _tensor(value: ir.TensorProtocol) -> Tensor:
    content = value.numpy().copy()
    if value.dtype == ir.DataType.BFLOAT16:  # NumPy has no such dtype
        return torch.from_numpy(content.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(content)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and torch.equal(actual, expected)
