"""Quantized weights as they were written: each checked, and loaded into the torch reference.

With its own rounded weights in torch, a graph is held to the tolerance of its activations, as a
float graph is; what the rounding itself costs is a figure beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.onnx.packed_names import groups_of, parts_of
from bone_fx.weights.recipes.nbits import QuantizedGroups, unpack
from bone_fx.weights.recipes.reorder import row_order

LARGEST_ERROR = {4: 0.25, 8: 0.02}
"""Norm of a weight's rounding error by bits, relative to the weight's norm."""

ROUNDED_ACTIVATIONS = 1.0
"""Largest difference that products with activations in int8 may make; on random tokens it is far
above that on a text, and the same graph without it is held to the tolerance of its dtype."""

_NEAREST = 0.51  # of a step; a half, and what float32 leaves open


@dataclass(frozen=True)
class Written:
    """A written graph with quantized weights.

    Attributes:
        folder: The folder with `model.onnx`.
    """

    folder: Path

    def load_into(self, model: nn.Module) -> int:
        """Replace a folded model's weights by those that were written; returns how many.

        Raises:
            VerificationError: A written weight is not the model's, rounded to nearest.
        """
        loaded = 0
        written = _weights(self.folder / "model.onnx")
        for name, gathered, groups, bits in _apart(written, model):
            owner, attribute, weight = _parameter(model, name, gathered)
            stored = weight.detach().float()
            values = groups.values()
            # A product's weight lies [N, K] in the file; the model may keep it [K, N].
            fits = [w for w in (stored, stored.t()) if w.shape == values.shape]
            wrong = [_what_differs(w, values, groups, bits) for w in fits]
            if not wrong or all(wrong):
                raise VerificationError(
                    f"verification failed: {name}: the written weight is not the folded one",
                    expected=f"the folded weight rounded to {bits} bits",
                    found=wrong[0] if wrong else f"shape {list(values.shape)}",
                    next_step="nothing was published; the build is kept as <output>.rejected",
                )
            as_stored = values if fits[wrong.index("")] is stored else values.t()
            setattr(owner, attribute, nn.Parameter(as_stored.contiguous(), requires_grad=False))
            loaded += 1
        return loaded


class RoundedWeights(Written):
    """A written graph whose weights are in bf16."""

    def load_into(self, model: nn.Module) -> int:
        """Round a folded model's weights as the written ones are; returns how many."""
        parameters = list(model.parameters())
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(parameter.bfloat16())
        return len(parameters)


def _apart(
    written: Iterable[tuple[str, bool, QuantizedGroups, int]], model: nn.Module
) -> Iterator[tuple[str, bool, QuantizedGroups, int]]:
    """Weights that were packed into one product, each by itself."""
    for name, gathered, groups, bits in written:
        parts = parts_of(name)
        if (order := groups_of(name.partition(".codes")[0])) is not None:
            back = torch.argsort(row_order(*order))
            ordered = (tensor[back] for tensor in (groups.codes, groups.scales, groups.zeros))
            yield name, gathered, QuantizedGroups(*ordered), bits
            continue
        if len(parts) == 1:
            yield name, gathered, groups, bits
            continue
        rows = [_parameter(model, part, gathered)[2].shape[0] for part in parts]
        tensors = (groups.codes, groups.scales, groups.zeros)
        pieces = zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)
        for part, piece in zip(parts, pieces, strict=True):
            yield part, gathered, QuantizedGroups(*piece), bits


def _weights(path: Path) -> Iterator[tuple[str, bool, QuantizedGroups, int]]:
    """Name, whether rows are gathered, content and bits of each quantized weight."""
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
        scales_NG = _content(scales)
        count = scales_NG.shape[1]
        zeros_NG = (
            torch.full(scales_NG.shape, 1 << (bits - 1), dtype=torch.uint8)
            if zeros is None
            else unpack(_content(zeros), bits, count)
        )
        assert codes is not None
        codes_NGB = unpack(_content(codes), bits, size)
        yield str(codes.name), gathered, QuantizedGroups(codes_NGB, scales_NG, zeros_NG), bits


def _content(value: ir.Value | None) -> Tensor:
    assert value is not None
    assert value.const_value is not None
    return torch.from_numpy(value.const_value.numpy().copy())


def _parameter(model: nn.Module, codes: str, gathered: bool) -> tuple[nn.Module, str, Tensor]:
    """The module, the attribute and the tensor that codes were made from.

    Of the names of a tied weight: an embedding's if rows are gathered, else another's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name = max((n for n in parameters if codes.startswith(f"{n}.")), key=len, default=None)
    if name is None:
        raise VerificationError(f"{codes}: the model has no such weight")
    weight = parameters[name]
    aliases = [n for n, p in parameters.items() if p is weight]
    fitting = [
        n
        for n in aliases
        if isinstance(model.get_submodule(n.rpartition(".")[0]), nn.Embedding) == gathered
    ]
    chosen = name if name in fitting or not fitting else fitting[0]
    owner, _, attribute = chosen.rpartition(".")
    return model.get_submodule(owner), attribute, weight


def _what_differs(weight: Tensor, values: Tensor, groups: QuantizedGroups, bits: int) -> str:
    """Why codes are not a weight rounded to nearest; empty if they are."""
    error = float((values - weight).norm() / weight.norm().clamp(min=1e-30))
    if error > LARGEST_ERROR[bits]:
        return f"other values: they differ by {error:.2g} of the weight"
    scales = groups.scales.float().unsqueeze(-1)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    places = weight.view_as(groups.codes) * inverse + groups.zeros.float().unsqueeze(-1)
    off = (places.clamp(0, (1 << bits) - 1) - groups.codes.float()).abs().max()
    return "" if float(off) <= _NEAREST else f"a code that is {float(off):.2f} steps off"
