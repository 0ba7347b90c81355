"""The written constants, each against the reference model's own parameter.

Logits hide a single weight's mistake where fp16 rounds it away, or where no token of a test reads
the row; the bytes do not. Not adapted sites only: every constant that carries a parameter's name is
made again from the parameter transformers loaded (packed, put part by part, transposed, cast) and
compared bit for bit. Quantized weights are compared when they are loaded into the reference
(`verify.compare_quantized`), tables of rotary embeddings in `verify.rotary_tables`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError
from bone_fx.onnx.packed_names import groups_of, parts_of
from bone_fx.verify.fold_bounds import lies_within
from bone_fx.verify.graph import tensor_of
from bone_fx.verify.reference import (
    Adapters,
    adapted_layers,
    folded_bounds,
    steps_of,
    stored,
    weight_name,
)
from bone_fx.weights.recipes.reorder import row_order

Bounds = Sequence[tuple[Tensor, Tensor]]
"""The least and the largest values of parameters; one tensor twice where they are exact."""
_ADD_ONE = "_plus_one"


@dataclass(frozen=True)
class Compared:
    """What was found in a graph.

    Attributes:
        parameters: Names of the parameters whose constants are right.
        others: Floating constants of more than one value that no parameter names: only outputs
            speak for them.
    """

    parameters: frozenset[str]
    others: tuple[str, ...]


def verify_constants(
    path: Path, model: nn.Module, adapters: Adapters, dtype: torch.dtype = torch.float32
) -> Compared:
    """Compare the constants of a written model with the reference model's parameters.

    Args:
        path: The model's file.
        model: The base in float32 with the adapters' own parameters; its weights are not folded.
        adapters: The adapters as verification read them, in the order in which they apply.
        dtype: Of the exported model's parameters; some are read in another (a router's in float32).

    Raises:
        VerificationError: A constant differs, or an adapted weight has none; the message names it.
    """
    sources = _Sources(model, adapters, dtype)
    constants = ir.load(path).graph.initializers
    right: set[str] = set()
    others = []
    for name, value in constants.items():
        if value.const_value is None or value.dtype is None:
            continue
        whole, _, quantized = name.partition(".codes")
        if quantized or name.endswith(".codes"):
            right.update(parts_of(whole))
            continue
        parts = [] if not value.dtype.is_floating_point() else sources.parts(name)
        if parts:
            layout = sources.layout(parts, _read_by_inputs(value))
            sources.compare(name, parts, tensor_of(value.const_value), layout)
            right.update(parts)
        elif value.dtype.is_floating_point() and value.const_value.size > 1:
            others.append(name)
    # Scales are compared with their codes.
    others = [n for n in others if f"{n.removesuffix('.scales')}.codes" not in constants]
    for layer in adapted_layers(adapters):
        weight = weight_name(model, layer)
        if not sources.aliases(weight) & right:
            raise VerificationError(
                f"verification failed: {layer}: the exported model has no constant {weight}",
                next_step=LOOK,
            )
    return Compared(frozenset(right), tuple(others))


@dataclass(frozen=True)
class _Layout:
    """How a constant holds matrices of the model, by what reads it.

    Attributes:
        outputs: The axis of the model's matrices along which outputs lie, and several stand.
        transposed: Whether the constant is the transposed.
    """

    outputs: int
    transposed: bool


@dataclass(frozen=True)
class _Sources:
    """The reference's parameters and buffers, folded one at a time."""

    model: nn.Module
    adapters: Adapters
    dtype: torch.dtype

    def parts(self, constant: str) -> list[str]:
        """The parameters that a constant's name tells of; none if it tells of none."""
        names = parts_of(constant.removesuffix(".T").removesuffix(_ADD_ONE))
        return names if all(stored(self.model, name) is not None for name in names) else []

    def aliases(self, name: str) -> set[str]:
        """Every name of a parameter."""
        parameter = stored(self.model, name)
        return {n for n, p in self.model.named_parameters(remove_duplicate=False) if p is parameter}

    def layout(self, parts: list[str], read_by_inputs: bool | None) -> _Layout | None:
        """How a constant holds matrices of its parameters; None if its reader leaves that open."""
        owners = [self.model.get_submodule(name.rpartition(".")[0]) for name in parts]
        kept = {kept_by_inputs(module) for module in owners}
        if read_by_inputs is None or len(kept) != 1 or None in kept:
            return None
        by_inputs = bool(kept.pop())
        return _Layout(int(by_inputs), transposed=by_inputs != read_by_inputs)

    def compare(
        self, constant: str, parts: list[str], actual: Tensor, layout: _Layout | None
    ) -> None:
        """Refuse a constant that is not made of its parameters."""
        folded = [folded_bounds(self.model, name, self.adapters) for name in parts]
        if self._is_made_of(folded, constant, actual, layout):
            return
        plain = [(self._plain(name), self._plain(name)) for name in parts]
        of_base = self._is_made_of(plain, constant, actual, layout)
        turned = layout is not None and self._is_made_of(folded, constant, actual, None)
        layer = self._first_difference(constant, folded, parts, actual, layout)
        raise VerificationError(
            f"verification failed: {layer}: the written weight is not the folded one"
            if any(
                steps_of(key, self.adapters)
                for name in parts
                for key in (name, name.removesuffix(".weight"))
            )
            else f"verification failed: {layer}: the written constant is not the base's",
            expected="torch's own, bit for bit"
            if all(low is high for low, high in folded)
            else "torch's own, within what float32 rounds",
            found="the base weight, unfolded"
            if of_base
            else ("the weight, transposed" if turned else "other values"),
            next_step=LOOK,
        )

    def _is_made_of(
        self, parts: Bounds, constant: str, actual: Tensor, layout: _Layout | None
    ) -> bool:
        """Whether a constant holds parts as they are read, or rounded to what they are kept in."""
        lows, highs = [low for low, _ in parts], [high for _, high in parts]
        kept = dict.fromkeys((actual.dtype, self.dtype))
        if all(low is high for low, high in parts):
            layouts = _layouts(constant, lows, layout)
            return any(_same(actual, each.to(k).to(actual.dtype)) for each in layouts for k in kept)
        return any(
            _between(actual, low.to(k), high.to(k))
            for low, high in zip(
                _layouts(constant, lows, layout), _layouts(constant, highs, layout), strict=True
            )
            for k in kept
        )

    def _plain(self, name: str) -> Tensor:
        parameter = stored(self.model, name)
        assert parameter is not None
        return parameter.detach()

    def _first_difference(
        self,
        constant: str,
        folded: Bounds,
        parts: list[str],
        actual: Tensor,
        layout: _Layout | None,
    ) -> str:
        """The layer of the first part of a packed constant that differs."""
        layers = [name.rpartition(".")[0] or name for name in parts]
        if len(parts) == 1 or groups_of(_plain_name(constant)) is not None:
            return layers[0]
        for dim in range(actual.dim()):
            lengths = [low.shape[0] for low, _ in folded]
            if sum(lengths) != actual.shape[dim]:
                continue
            pieces = torch.split(actual, lengths, dim)
            for layer, piece, part in zip(layers, pieces, folded, strict=True):
                if not self._is_made_of([part], "", piece, layout):
                    return layer
        return layers[0]


def _plain_name(constant: str) -> str:
    return constant.removesuffix(".T").removesuffix(_ADD_ONE)


def kept_by_inputs(module: nn.Module) -> bool | None:
    """Whether a matrix of a module is [I, O], or [O, I] as torch's; None if nobody says."""
    if isinstance(module, nn.Linear):
        return False
    return True if type(module).__name__ == "Conv1D" else None


def _read_by_inputs(value: ir.Value) -> bool | None:
    """Whether the nodes that read a matrix take it as [I, O], or as [O, I]; None if neither."""
    ways = {_way(node, place) for node, place in value.uses()}
    return ways.pop() if len(ways) == 1 else None


def _way(node: ir.Node, place: int) -> bool | None:
    if node.op_type in ("MatMul", "FusedMatMul", "Gemm") and place == 1:
        return not node.attributes.get_int("transB", 0)
    return None


def _layouts(constant: str, parts: list[Tensor], layout: _Layout | None) -> Iterator[Tensor]:
    """The forms in which a constant may hold its parameters: as they are, or transposed."""
    if constant.removesuffix(".T").endswith(_ADD_ONE):
        parts = [part + 1 for part in parts]
    order = groups_of(_plain_name(constant))
    if any(part.dim() != 2 or part.shape[0] != part.shape[1] for part in parts):
        layout = None  # shapes tell, and a model may read a layer's matrix from its other side
    dims = range(min(2, parts[0].dim()) or 1) if layout is None else [layout.outputs]
    for dim in dims:
        whole = parts[0] if len(parts) == 1 else _joined(parts, dim)
        if whole is None:
            continue
        if order is not None and whole.shape[dim] == len(row_order(*order)):
            whole = whole.index_select(dim, row_order(*order))
        if layout is not None:
            yield whole.t() if layout.transposed else whole
            continue
        yield whole
        if whole.dim() > 1:
            yield whole.transpose(-1, -2)
        if whole.dim() == 3 and whole.shape[1] % 2 == 0:  # gate and up of experts, row by row
            yield (whole.view(len(whole), 2, -1, whole.shape[2]).transpose(1, 2).reshape_as(whole))
        if len(parts) == 1 and order is None:
            return


def _joined(parts: list[Tensor], dim: int) -> Tensor | None:
    others = {tuple(s for i, s in enumerate(p.shape) if i != dim) for p in parts}
    return torch.cat(parts, dim) if len(others) == 1 else None


def _between(actual: Tensor, low: Tensor, high: Tensor) -> bool:
    if not _same_sizes(actual, low):
        return False
    return lies_within(actual, low.reshape(actual.shape), high.reshape(actual.shape))


def _same_sizes(actual: Tensor, expected: Tensor) -> bool:
    sizes, others = ([s for s in tensor.shape if s != 1] for tensor in (actual, expected))
    return sizes == others


def _same(actual: Tensor, expected: Tensor) -> bool:
    if not _same_sizes(actual, expected):
        return False
    expected = expected.reshape(actual.shape)
    if torch.equal(actual, expected):
        return True
    has_nan = bool(actual.isnan().any())  # whose outputs are what is refused
    return has_nan and torch.allclose(actual, expected, rtol=0, atol=0, equal_nan=True)
