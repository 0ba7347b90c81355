"""Names for the dynamic dimensions of a model, in place of the symbols of the trace."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from bone_fx.errors import CaptureError

DimNames = Mapping[str, Mapping[int, str]]
"""Name of an input or output -> axis -> name of the dimension."""

_SYMBOL = re.compile(r"[A-Za-z_]\w*")


def name_dims(model: ir.Model, names: DimNames) -> None:
    """Renames symbols wherever they stand.

    Before: input_ids [s43, s53], inner [s43, 4, s53 + s61]
    After:  input_ids [batch_size, sequence_length], inner [batch_size, 4, sequence_length + s61]

    An expression that `names` gives a name to, as the dimension of an output, gets it everywhere.

    Raises:
        CaptureError: A dimension that was to be dynamic has a fixed size in the graph.
    """
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_number(dim) for dim in value.shape])
    symbols: dict[str, str] = {}
    tensors = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for tensor, axes in names.items():
        endpoint = tensors.get(tensor)
        if endpoint is None or endpoint.shape is None:
            continue
        for axis, name in axes.items():
            dim = endpoint.shape[axis]
            if isinstance(dim, int):
                raise CaptureError(
                    f"dimension {axis} of {tensor!r} ({name}) has the fixed size {dim}",
                    expected="a dynamic dimension",
                    next_step="the model's code ties it to a number: export with that size fixed",
                )
            if dim.value is not None:
                symbols.setdefault(dim.value, name)
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, symbols) for dim in value.shape])


def _number(dim: int | ir.SymbolicDim) -> int | str | None:
    """A symbol that the trace found to have one value only, as that number."""
    if isinstance(dim, int):
        return dim
    return int(dim.value) if dim.value is not None and dim.value.isdecimal() else dim.value


def _renamed(dim: int | ir.SymbolicDim, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    if dim.value in symbols:
        return symbols[dim.value]
    return _SYMBOL.sub(lambda match: symbols.get(match.group(), match.group()), dim.value)


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs
