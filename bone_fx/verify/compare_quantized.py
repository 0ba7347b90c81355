"""Quantized weights as they were written: each checked, and loaded into the torch reference.

With its own rounded weights in torch, a graph is held to the tolerance of its activations, as a
float graph is; what the rounding itself costs is a figure beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError
from bone_fx.onnx.packed_names import groups_of, parts_of
from bone_fx.verify.compare_experts import load_experts
from bone_fx.verify.constants import kept_by_inputs
from bone_fx.verify.graph import tensor_of
from bone_fx.verify.written_codes import LARGEST_ERROR, parameter_of, what_differs
from bone_fx.weights.recipes.nbits import QuantizedGroups, unpack
from bone_fx.weights.recipes.reorder import row_order
from bone_fx.weights.streamed import change, replacement

ROUNDED_ACTIVATIONS = 1.0
"""Largest difference that products with activations in int8 may make; on random tokens it is far
above that on a text, and the same graph without it is held to the tolerance of its dtype."""

_ROWS_BLOCKS_BYTES = 3


@dataclass(frozen=True)
class Written:
    """A written graph with quantized weights.

    Attributes:
        path: The model's file.
        accuracy_level: What its products say of their activations, as `MatMulNBits` takes it: 4
            rounds them to int8, 0 keeps them.
    """

    path: Path
    accuracy_level: int = 0

    def load_into(self, model: nn.Module) -> int:
        """Replace a folded model's weights by those that were written; returns how many.

        Raises:
            VerificationError: A written weight is not the model's, rounded to nearest.
        """
        loaded = load_experts(self.path, model, self.accuracy_level)
        for written in _weights(self.path, model, self.accuracy_level):
            name, bits = written.name, written.bits
            owner, attribute, weight = parameter_of(model, name, gathered=written.gathered)
            stored = weight.detach().float()
            groups = written.groups()
            values = groups.values()
            # A product's weight lies [N, K] in the file; the model may keep it [K, N].
            fits = [w for w in (stored, stored.t()) if w.shape == values.shape]
            if len(fits) > 1 and (by_inputs := kept_by_inputs(owner)) is not None:
                fits = [fits[by_inputs]]
            wrong = [what_differs(w, values, groups, bits) for w in fits]
            if not wrong or all(wrong):
                raise VerificationError(
                    f"verification failed: {name}: the written weight is not the folded one",
                    expected=f"the folded weight rounded to {bits} bits",
                    found=wrong[0] if wrong else f"shape {list(values.shape)}",
                    next_step=LOOK,
                )
            written = replace(written, transposed=fits[wrong.index("")] is not stored)
            setattr(owner, attribute, replacement(weight, written.as_stored(values), written.read))
            loaded += 1
        return loaded


class RoundedWeights(Written):
    """A written graph whose weights are in bf16."""

    def load_into(self, model: nn.Module) -> int:
        """Round a folded model's weights as the written ones are; returns how many."""
        parameters = list(model.parameters())
        for parameter in parameters:
            change(parameter, _rounded)
        return len(parameters)


def _rounded(weight: Tensor) -> Tensor:
    return weight.bfloat16().to(weight.dtype)


@dataclass(frozen=True)
class _Weight:
    """A quantized weight in a file, or the rows of one that are a parameter's.

    Attributes:
        name: The parameter's name, or what begins with it.
        gathered: Whether rows are gathered; else it is a product's.
        bits: Of a code.
        size: Values that share a scale.
        codes: Packed codes.
        scales: Their scales.
        zeros: Their packed zero points; None for the middle code.
        rows: Takes the parameter's rows, in its order, of a tensor.
        transposed: Whether the parameter lies the other way round.
    """

    name: str
    gathered: bool
    bits: int
    size: int
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None
    rows: Callable[[Tensor], Tensor] = torch.Tensor.contiguous
    transposed: bool = False

    def groups(self) -> QuantizedGroups:
        """The content."""
        scales_NG = self._content(self.scales)
        zeros_NG = (
            torch.full(scales_NG.shape, 1 << (self.bits - 1), dtype=torch.uint8)
            if self.zeros is None
            else unpack(self._content(self.zeros), self.bits, scales_NG.shape[1])
        )
        codes_NGB = unpack(self._content(self.codes), self.bits, self.size)
        return QuantizedGroups(codes_NGB, scales_NG, zeros_NG)

    def read(self) -> Tensor:
        """The parameter that the codes stand for, in float32."""
        return self.as_stored(self.groups().values())

    def as_stored(self, values: Tensor) -> Tensor:
        """Values as the parameter keeps them."""
        return (values.t() if self.transposed else values).contiguous()

    def _content(self, value: ir.Value) -> Tensor:
        assert value.const_value is not None
        return self.rows(tensor_of(value.const_value))


def _weights(path: Path, model: nn.Module, accuracy_level: int) -> Iterator[_Weight]:
    """The quantized weights of a file; those that were packed into one product each by itself."""
    for node in ir.load(path).graph:
        gathered = node.op_type == "GatherBlockQuantized"
        if not gathered and node.op_type != "MatMulNBits":
            continue
        first, second = (0, 2) if gathered else (1, 2)
        codes = node.inputs[first]
        if gathered and codes is not None and codes.producer() is not None:
            codes = codes.producer().inputs[0]  # type: ignore[union-attr]  # a Reshape of them
        scales, zeros = (
            node.inputs[i] if i < len(node.inputs) else None for i in (second, second + 1)
        )
        bits, size = (node.attributes[n].as_int() for n in ("bits", "block_size"))
        assert codes is not None
        assert scales is not None
        dims = () if codes.shape is None else codes.shape.numpy()
        stored = dims[-1] * 8 // bits if len(dims) == _ROWS_BLOCKS_BYTES else size
        if bits not in LARGEST_ERROR or size != stored:
            raise VerificationError(
                f"verification failed: {codes.name}: its node reads codes of another size",
                expected=" or ".join(f"{known} bits" for known in LARGEST_ERROR),
                found=f"{bits} bits, {size} to a block",
                next_step=LOOK,
            )
        level = node.attributes.get_int("accuracy_level", 0)
        if not gathered and level != accuracy_level:
            raise VerificationError(
                f"verification failed: {codes.name}: its product rounds activations otherwise",
                expected=f"accuracy_level {accuracy_level}",
                found=f"accuracy_level {level}",
                next_step=LOOK,
            )
        whole = _Weight(str(codes.name), gathered, bits, size, codes, scales, zeros)
        parts = parts_of(whole.name)
        if (order := groups_of(whole.name.partition(".codes")[0])) is not None:
            back = torch.argsort(row_order(*order))
            yield replace(whole, rows=partial(torch.index_select, dim=0, index=back))
        elif len(parts) == 1:
            yield whole
        else:
            start = 0
            for part in parts:
                count = parameter_of(model, part, gathered=gathered)[2].shape[0]
                rows = partial(torch.narrow, dim=0, start=start, length=count)
                yield replace(whole, name=part, rows=rows)
                start += count
