"""Which sizes of a captured forward vary, under which names, and which do not though asked to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from bone_fx.capture.trace.examples import BATCH

Roles = Mapping[str, Mapping[int, str]]
"""Input -> dimension that is to vary -> "batch", "length", `UNNAMED`, or a name of the caller's."""

UNNAMED = ""

_MAIN_LENGTHS = ("input_ids", "attention_mask", "token_type_ids", "inputs_embeds", "position_ids")


def user_inputs(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Name in the graph of each tensor input -> its fake tensor."""
    names = [
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind == InputKind.USER_INPUT and isinstance(spec.arg, TensorArgument)
    ]
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    return {name: nodes[name].meta["val"] for name in names}


def roles_of(dynamic_shapes: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """The dimensions that `torch.export`'s `dynamic_shapes` insist on; AUTO does not."""
    roles: dict[str, dict[int, str]] = {}
    for name, axes in dynamic_shapes.items():
        if isinstance(axes, Mapping):
            items = dict(axes)
        else:
            items = dict(enumerate(axes)) if isinstance(axes, Sequence) else {}
        role_of_axis = {
            axis: UNNAMED if dim == Dim.DYNAMIC else str(getattr(dim, "__name__", UNNAMED))
            for axis, dim in items.items()
            if not (dim is None or isinstance(dim, int) or dim in (Dim.STATIC, Dim.AUTO))
        }
        if role_of_axis:
            roles[name] = role_of_axis
    return roles


def name_dims(inputs: Mapping[str, torch.Tensor], roles: Roles) -> dict[str, dict[int, str]]:
    """Names for the dimensions that vary: batch, length, the caller's own, else input and axis."""
    names: dict[str, dict[int, str]] = {}
    of_symbol: dict[str, str] = {}
    for name, tensor in inputs.items():
        for axis, size in enumerate(tensor.shape):
            if fixed_size(size) is None:
                role = roles.get(name, {}).get(axis, UNNAMED)
                dim_name = of_symbol.setdefault(str(size), _dim_name(name, axis, role))
                names.setdefault(name, {})[axis] = dim_name
    return names


def fixed_dims(
    inputs: Mapping[str, torch.Tensor], roles: Roles, reason: Exception | None
) -> tuple[str, ...]:
    """Says which dimensions that were to vary do not."""
    because = f": {reason_line(reason)}" if reason is not None else " by the model's own code"
    return tuple(
        f"dimension {axis} of {name} ({role or 'dynamic'}) is fixed at {size}{because}"
        for name, role_of_axis in roles.items()
        if name in inputs
        for axis, role in role_of_axis.items()
        if (size := fixed_size(inputs[name].shape[axis])) is not None
    )


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The number that a traced size is, also where a symbol turned out to have one value."""
    return size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size


def reason_line(error: Exception) -> str:
    """The class of an error that `torch.export` raised, and its reason or else its first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line.removeprefix("- ") for line in lines if line.startswith("- ")), None)
    return ": ".join([type(error).__name__, *(lines[:1] if reason is None else [reason])])


def _dim_name(name: str, axis: int, role: str) -> str:
    if role == BATCH:
        return "batch_size"
    if role == "length":
        if name in _MAIN_LENGTHS:
            return "sequence_length"
        if name.startswith("decoder_"):
            return "decoder_sequence_length"
    return f"{name}_dim_{axis}" if role in (UNNAMED, "length") else role
