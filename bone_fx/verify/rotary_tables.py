"""The tables of rotary embeddings in a graph, each row against the reference model's own module.

Short texts read the first rows only; a table that is wrong beyond them would pass every prompt of a
verification.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError
from bone_fx.verify.graph import tensor_of

_ROWS = 1 << 15
"""Positions that are computed at a time."""

_ROUNDING = 4
"""Units in the last place of the table's dtype, at 1, that a value may be off."""


def verify_rotary_tables(folder: Path, model: nn.Module, names: Iterable[str]) -> list[str]:
    """Compare the cosine and sine tables of a graph with the reference's rotary modules.

    Args:
        folder: The folder with `model.onnx`.
        model: The reference.
        names: Constants that no parameter names.

    Returns:
        The names of the tables that are right; a reference without such a module gives none.

    Raises:
        VerificationError: A table is that of none of the reference's modules.
    """
    constants = ir.load(folder / "model.onnx").graph.initializers
    names = [name for name in names if name.startswith(("cos_cache", "sin_cache"))]
    modules = [m for m in model.modules() if _is_rotary(m)]
    if not modules:
        return []
    for name in names:
        value = constants[name].const_value
        assert value is not None
        table = tensor_of(value)
        differences = [
            first
            for module in modules
            for kind in _kinds(module, model)
            for first in _first_wrong_rows(table, module, kind, cosine=name.startswith("cos"))
        ]
        if None in differences:
            continue
        row = max(row for row in differences if row is not None)
        raise VerificationError(
            f"verification failed: {name}: the table of positions is not the model's",
            expected="the cosines and sines of the reference's rotary embedding",
            found=f"other values from position {row} on",
            next_step="nothing was published; the build is kept as <output>.rejected",
        )
    return names


def _is_rotary(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return any(name.endswith("inv_freq") for name in names) and "position_ids" in (
        inspect.signature(module.forward).parameters
    )


def _kinds(module: nn.Module, model: nn.Module) -> list[str | None]:
    """The kinds of layers that a module has tables for; one None where all share one."""
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [None]
    config = getattr(module, "config", model.config)
    return list(dict.fromkeys(getattr(config, "layer_types", None) or [None]))


def _first_wrong_rows(
    table: Tensor, module: nn.Module, kind: str | None, *, cosine: bool
) -> Iterator[int | None]:
    """The first wrong row by length that the module may choose a table for; None if all fit."""
    original = getattr(getattr(module, "config", None), "original_max_position_embeddings", None)
    lengths = {len(table), min(len(table), original or len(table))}
    for length in sorted(lengths):
        yield _first_wrong_row(table, module, kind, length, cosine=cosine)


def _first_wrong_row(
    table: Tensor, module: nn.Module, kind: str | None, length: int, *, cosine: bool
) -> int | None:
    last = torch.tensor([length - 1])
    more = {} if kind is None else {"layer_type": kind}
    allowed = _ROUNDING * torch.finfo(table.dtype).eps
    for start in range(0, length, _ROWS):
        positions = torch.cat([torch.arange(start, min(start + _ROWS, length)), last])
        with torch.no_grad():
            both = module(torch.zeros(1, dtype=torch.float32), positions[None], **more)
        whole = both[0 if cosine else 1].reshape(len(positions), -1)[:-1].float()
        rows, half = table[start : start + _ROWS][: len(whole)].float(), table.shape[1]
        if whole.shape[1] < half:
            return start
        wrong = [
            (rows - part).abs().amax(1) > allowed * part.abs().amax().clamp_min(1)
            for part in (whole[:, :half], whole[:, : 2 * half : 2])
            if part.shape == rows.shape
        ]
        if not wrong or all(bool(each.any()) for each in wrong):
            return start + max((int(each.int().argmax()) for each in wrong), default=0)
    return None
