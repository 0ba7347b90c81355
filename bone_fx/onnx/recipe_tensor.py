"""An ONNX initializer whose bytes come from a recipe."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from bone_fx.weights.recipes.recipe import Recipe


class RecipeTensor(ir.LazyTensor):
    """A tensor of known shape and dtype, evaluated when its content is asked for, never kept."""

    def __init__(self, recipe: Recipe, name: str | None = None) -> None:
        super().__init__(
            lambda: TorchTensor(recipe.evaluate(), name=name),
            dtype=from_torch_dtype(recipe.dtype),
            shape=ir.Shape(recipe.shape),
            name=name,
        )
        self.recipe = recipe


def recipe_of(value: ir.Value | None) -> Recipe | None:
    """The recipe behind an initializer; None for any other value."""
    if value is None or not value.is_initializer() or value.is_graph_input():
        return None
    tensor = value.const_value
    return tensor.recipe if isinstance(tensor, RecipeTensor) else None


def set_recipe(value: ir.Value, recipe: Recipe) -> None:
    """Binds an initializer to a recipe, and its declared shape and type with it."""
    tensor = RecipeTensor(recipe, value.name)
    value.const_value = tensor
    value.shape = tensor.shape
    value.dtype = tensor.dtype
