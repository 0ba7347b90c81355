"""Quantized experts as they were written: each checked, and loaded into the torch reference.

One expert's codes are in memory at a time, and of the reference's the weights of one mixture.

Shape letters: X experts, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError
from bone_fx.onnx.quantize_experts import PLACES, ROUTER_WEIGHTS
from bone_fx.verify.written_codes import LARGEST_ERROR, parameter_of, what_differs
from bone_fx.weights.recipes.nbits import QuantizedGroups, unpack
from bone_fx.weights.streamed import replacement


def load_experts(path: Path, model: nn.Module, accuracy_level: int) -> int:
    """Replace the weights of a model's experts by those of a written graph; returns how many.

    Args:
        path: `model.onnx`.
        model: The folded model.
        accuracy_level: What QMoE says of its activations.

    Raises:
        VerificationError: A written weight is not the model's, rounded to nearest.
    """
    loaded = 0
    for written in _written(path, accuracy_level):
        owner, attribute, weight = parameter_of(model, written.name, gathered=False)
        way = written.way_of(weight.detach())

        def read(written: _Experts = written, way: _Way = way) -> Tensor:
            return written.read(way)

        setattr(owner, attribute, replacement(weight, read(), read))
        loaded += 1
    return loaded


@dataclass(frozen=True)
class _Way:
    """How QMoE's rows `[N, K]` of an expert lie in the model's parameter.

    Attributes:
        transposed: As [K, N].
        in_turns: QMoE takes gates and ups in turns, the parameter has all gates before all ups.
    """

    transposed: bool
    in_turns: bool

    def rows(self, weight: Tensor) -> Tensor | None:
        """The rows of an expert's weight; None if it has an odd number of them."""
        w_NK = weight.t() if self.transposed else weight
        if not self.in_turns:
            return w_NK
        if len(w_NK) % 2:
            return None
        return w_NK.reshape(2, -1, w_NK.shape[1]).transpose(0, 1).flatten(0, 1)

    def stored(self, w_NK: Tensor) -> Tensor:
        """An expert's weight of its rows."""
        if self.in_turns:
            w_NK = w_NK.view(-1, 2, w_NK.shape[1]).transpose(0, 1).flatten(0, 1)
        return w_NK.t() if self.transposed else w_NK


_WAYS = [_Way(*each) for each in ((False, False), (False, True), (True, False), (True, True))]


@dataclass(frozen=True)
class _Experts:
    """The quantized weights of one product of a mixture.

    Attributes:
        name: The parameter's name, and what follows it.
        bits: Of a code.
        size: Values that share a scale.
        codes: Packed codes `[X, N, K * bits / 8]`.
        scales: Their scales.
        zeros: Their packed zero points; None for the middle code.
    """

    name: str
    bits: int
    size: int
    codes: ir.Value
    scales: ir.Value
    zeros: ir.Value | None

    def way_of(self, weight: Tensor) -> _Way:
        """How the parameter keeps the rows, all of which are then its own, rounded to nearest."""
        ways = list(_WAYS)
        count = self.scales.shape.numpy()[0] if self.scales.shape is not None else 0
        if count != len(weight):
            last = min(count, len(weight))
            raise self._error(last, f"{count} experts, and the model has {len(weight)}")
        for expert, groups in enumerate(self.groups()):
            one = weight[expert].float()
            found = {way: self._what_differs(way, one, groups) for way in ways}
            ways = [way for way, what in found.items() if not what]
            if not ways:
                raise self._error(expert, min(found.values(), key=_unlikely))
        return ways[0]

    def _what_differs(self, way: _Way, weight: Tensor, groups: QuantizedGroups) -> str:
        values_NK, rows_NK = groups.values(), way.rows(weight)
        if rows_NK is None or rows_NK.shape != values_NK.shape:
            return f"shape {list(values_NK.shape)}"
        return what_differs(rows_NK.contiguous(), values_NK, groups, self.bits)

    def read(self, way: _Way) -> Tensor:
        """The parameter that the codes stand for, in float32."""
        return torch.stack([way.stored(groups.values()) for groups in self.groups()])

    def groups(self) -> Iterator[QuantizedGroups]:
        """The content, expert by expert."""
        values = [v for v in (self.codes, self.scales, self.zeros) if v is not None]
        tensors = [v.const_value for v in values if v.const_value is not None]
        try:
            for expert in range(tensors[0].shape.numpy()[0]):
                codes_NC, scales_NG, *zeros = (_of_expert(tensor, expert) for tensor in tensors)
                outputs, count = scales_NG.shape
                codes = unpack(codes_NC, self.bits, count * self.size)
                middle = torch.full((outputs, count), 1 << (self.bits - 1), dtype=torch.uint8)
                zeros_NG = unpack(zeros[0], self.bits, count) if zeros else middle
                yield QuantizedGroups(codes.view(outputs, count, self.size), scales_NG, zeros_NG)
        finally:
            for tensor in tensors:
                if isinstance(tensor, ir.ExternalTensor):
                    tensor.release()

    def _error(self, expert: int, found: str) -> VerificationError:
        weight = self.name.partition(".codes")[0]
        return VerificationError(
            f"verification failed: {weight}, expert {expert}: the written weight is another",
            expected=f"the model's weight rounded to {self.bits} bits",
            found=found,
            next_step=LOOK,
        )


def _unlikely(what: str) -> tuple[bool, bool]:
    """A key that puts the layout in front of which the fewest values differ."""
    return what.startswith("shape"), what.startswith("other")


def _of_expert(tensor: ir.TensorProtocol, expert: int) -> Tensor:
    return torch.from_numpy(tensor.numpy()[expert].copy())


def _written(path: Path, accuracy_level: int) -> Iterator[_Experts]:
    """The quantized weights of a file's mixtures."""
    for node in ir.load(path).graph:
        if node.op_type != "QMoE":
            continue
        bits, size = (node.attributes[n].as_int() for n in ("expert_weight_bits", "block_size"))
        level = node.attributes.get_int("accuracy_level", 0)
        _check_cuda(node)
        for codes_at, scales_at, zeros_at in zip(*PLACES.values(), strict=True):
            codes, scales = node.inputs[codes_at], node.inputs[scales_at]
            zeros = node.inputs[zeros_at] if zeros_at < len(node.inputs) else None
            assert codes is not None
            assert scales is not None
            _check_sizes(codes, scales, bits, size)
            if level != accuracy_level:
                raise VerificationError(
                    f"verification failed: {codes.name}: its mixture rounds activations otherwise",
                    expected=f"accuracy_level {accuracy_level}",
                    found=f"accuracy_level {level}",
                    next_step=LOOK,
                )
            yield _Experts(str(codes.name), bits, size, codes, scales, zeros)


def _check_cuda(node: ir.Node) -> None:
    """Refuse what the kernel for the CPU passes over, and that for CUDA does not."""
    normalizes = bool(node.attributes.get_int("normalize_routing_weights", 0))
    given = len(node.inputs) > ROUTER_WEIGHTS and node.inputs[ROUTER_WEIGHTS] is not None
    wrong = []
    if node.attributes.get_int("weights_prepacked", -1) != 0:
        wrong.append("weights_prepacked is not 0, and its rows are as they are")
    if normalizes == given:
        wrong.append(f"normalize_routing_weights is {int(normalizes)}")
    if wrong:
        named = node.inputs[PLACES["codes"][0]]
        assert named is not None
        raise VerificationError(
            f"verification failed: {named.name}: its mixture is another on CUDA",
            expected="weights_prepacked 0, and weights of experts normalized or given",
            found=", ".join(wrong),
            next_step=LOOK,
        )


def _check_sizes(codes: ir.Value, scales: ir.Value, bits: int, size: int) -> None:
    """Refuse a node that reads codes of another size than its constants have."""
    of_codes = () if codes.shape is None else codes.shape.numpy()
    of_scales = () if scales.shape is None else scales.shape.numpy()
    inputs = of_codes[-1] * 8 // bits if bits in LARGEST_ERROR and of_codes else 0
    if not inputs or of_scales != (*of_codes[:-1], inputs // size) or inputs % size:
        raise VerificationError(
            f"verification failed: {codes.name}: its mixture reads codes of another size",
            expected=" or ".join(f"{known} bits" for known in LARGEST_ERROR),
            found=f"{bits} bits, {size} to a block, of {list(of_codes)} bytes and "
            f"{list(of_scales)} scales",
            next_step=LOOK,
        )
