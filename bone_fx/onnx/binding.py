"""Initializers of a translated model bound to the recipes of their bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype
from torch._subclasses.fake_tensor import FakeTensor

from bone_fx.errors import ExportError
from bone_fx.onnx.recipe_tensor import set_recipe
from bone_fx.weights.recipes.recipe import Recipe, Value, cast


def bind_recipes(model: ir.Model, recipes: Mapping[str, Recipe]) -> None:
    """Gives every initializer its recipe, cast to the graph's dtype.

    A constant of the trace keeps its own value. Names that share one recipe become one initializer,
    under the first name.

    Raises:
        ExportError: A constant has no bytes, or bytes of another shape.
    """
    graph = model.graph
    shared: dict[tuple[int, ir.DataType | None], ir.Value] = {}
    held: dict[object, Recipe] = {}  # one recipe for constants that share memory
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            graph.initializers.pop(name)
            continue
        recipe = recipes.get(name) or _own_value(value, held)
        if recipe is None:
            raise ExportError(
                f"the graph's constant {name!r} has no bytes",
                expected="a tensor in the base model or a buffer computed from its configuration",
                next_step="report this with the model's configuration",
            )
        key = (id(recipe), value.dtype)
        if key in shared and not value.is_graph_output():
            ir.convenience.replace_all_uses_with(value, shared[key])
            graph.initializers.pop(name)
            continue
        shared[key] = value
        _bind(value, recipe)


def _bind(value: ir.Value, recipe: Recipe) -> None:
    shape = tuple(value.shape.numpy()) if value.shape is not None else recipe.shape
    if shape != tuple(recipe.shape):
        raise ExportError(
            f"constant {value.name!r} has another shape than the graph expects",
            expected=list(shape),
            found=f"{list(recipe.shape)} from {recipe.describe()}",
        )
    set_recipe(
        value, cast(recipe, to_torch_dtype(value.dtype)) if value.dtype is not None else recipe
    )


def _own_value(value: ir.Value, held: dict[object, Recipe]) -> Recipe | None:
    """The tensor that the program holds, if real; one recipe for tensors that share memory."""
    tensor: Any = value.const_value
    if tensor is None:
        return None
    raw = tensor.raw  # the torch tensor: the exporter has a tensor class of its own, with `raw`
    if isinstance(raw, FakeTensor) or not isinstance(raw, torch.Tensor) or raw.is_meta:
        return None
    key = (raw.data_ptr(), raw.dtype, tuple(raw.shape), raw.stride()) if raw.numel() else object()
    return held.setdefault(key, Value(raw, origin="constant of the trace"))
