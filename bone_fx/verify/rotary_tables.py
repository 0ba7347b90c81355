"""The tables of rotary embeddings in a graph, each row against the module of the reading layer.

Short texts read the first rows only; a table that is wrong beyond them would pass every prompt of a
verification.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError
from bone_fx.verify.decoder.layers import LayerList, reading_layers
from bone_fx.verify.graph import tensor_of

_ROWS = 1 << 15
"""Positions that are computed at a time."""

_ROUNDING = 4
"""Units in the last place of the table's dtype, at 1, that a value may be off."""


def verify_rotary_tables(path: Path, model: nn.Module, names: Iterable[str]) -> list[str]:
    """Compare the cosine and sine tables of a graph with the reference's rotary modules.

    Args:
        path: The model's file.
        model: The reference.
        names: Constants that no parameter names.

    Returns:
        The names of the tables that are right; a reference without such a module gives none.

    Raises:
        VerificationError: A layer reads a table that is not its own in the reference.
    """
    names = [name for name in names if name.startswith(("cos_cache", "sin_cache"))]
    modules = [module for module in model.modules() if _is_rotary(module)] if names else []
    if not modules:
        return []
    constants = ir.load(path).graph.initializers
    graph = onnx.load(path, load_external_data=False).graph
    layers = LayerList.of(model)
    of_layers = {} if layers is None else _modules_by_layer(layers, modules)
    unowned = [m for m in modules if not any(m in own for own in of_layers.values())]
    for name in names:
        value = constants[name].const_value
        assert value is not None
        table = tensor_of(value)
        cosine = name.startswith("cos")
        readers: list[int | None] = []
        if layers is not None:
            readers += reading_layers(graph, layers.path, name)
        wrong = cache(partial(_wrong_row, table, cosine=cosine))
        for layer in readers or [None]:
            own = modules if layer is None else of_layers[layer] or unowned
            rows = [wrong(m, kind) for m in own for kind in _kinds(m, model, layer)]
            if None in rows:
                continue
            first = max(row for row in rows if row is not None)
            reader = "" if layer is None or layers is None else f", read by {layers.path}.{layer}"
            raise VerificationError(
                f"verification failed: {name}{reader}: the table of positions is not the model's",
                expected="the cosines and sines of the reference's rotary embedding",
                found=f"other values from position {first} on",
                next_step=LOOK,
            )
    return names


def _modules_by_layer(
    layers: LayerList, modules: Sequence[nn.Module]
) -> dict[int, list[nn.Module]]:
    """Those of some modules that each layer has for itself."""
    return {
        number: [module for module in layer.modules() if module in modules]
        for number, layer in enumerate(layers.layers)
    }


def _is_rotary(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_buffers(recurse=False)]
    return any(name.endswith("inv_freq") for name in names) and "position_ids" in (
        inspect.signature(module.forward).parameters
    )


def _kinds(module: nn.Module, model: nn.Module, layer: int | None) -> list[str | None]:
    """The kinds of layers that a module has tables for, or that of one layer; None for all.

    A layer reads the tables of its own modules, else of those that no layer owns; an unknown layer
    may read all, for all kinds.
    """
    if "layer_type" not in inspect.signature(module.forward).parameters:
        return [None]
    config = getattr(module, "config", model.config)
    kinds = getattr(config, "layer_types", None) or [None]
    return list(dict.fromkeys(kinds if layer is None or layer >= len(kinds) else [kinds[layer]]))


def _wrong_row(table: Tensor, module: nn.Module, kind: str | None, *, cosine: bool) -> int | None:
    """The first wrong row of a table that a module makes for one length of a text; None for none.

    Which length it chooses a table by is the graph's affair: one that fits is enough.
    """
    original = getattr(getattr(module, "config", None), "original_max_position_embeddings", None)
    lengths = sorted({len(table), min(len(table), original or len(table))})
    rows = [_first_wrong_row(table, module, kind, n, cosine=cosine) for n in lengths]
    return None if None in rows else max(row for row in rows if row is not None)


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
