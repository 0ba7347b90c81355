"""The checkpoint with weights that are read as they are used, for a model larger than the memory.

transformers' class runs in eager mode as it does whole. But transformers can only load a model
whole: here the weights come through the exporter's own load plan and reader, so a mistake of these
would be in both sides of a comparison. That is why whoever compares has to say so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bone_fx.base.architectures import reference_attention, with_overrides
from bone_fx.base.loading import BaseCheckpoint, skeleton
from bone_fx.lora.biases import add_biases
from bone_fx.weights.load_plan import recipes_for
from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.streamed import Room, StreamedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def streamed_model(
    base: BaseCheckpoint,
    architecture: type[PreTrainedModel],
    overrides: Mapping[str, Any],
    heads: Mapping[str, Tensor],
    untied: Collection[str],
    room: int,
) -> PreTrainedModel:
    """The model in float32 and eval mode; its matrices are `StreamedWeight`s.

    Vectors, and what is no parameter, are in memory. Arguments and errors are those of
    `base.real_model.load_model`.
    """
    config = with_overrides(base.config, overrides)
    model, plan = skeleton(
        base,
        torch.float32,
        architecture=architecture,
        config_overrides=overrides,
        attn_implementation=reference_attention(config),
        untie=untied,
    )
    add_biases(model, heads)
    shared = Room(room)
    by_recipe: dict[int, Tensor] = {}
    for name, recipe in recipes_for(model, plan, base.tensors, extra=heads).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        if id(recipe) not in by_recipe:
            is_parameter = attribute in owner._parameters
            if is_parameter and len(recipe.shape) > 1:
                shape = torch.Size(recipe.shape)
                rows = partial(_rows, recipe) if recipe.cuts(0) else None
                weight: Tensor = StreamedWeight(
                    shape, recipe.dtype, recipe.evaluate, shared, path, rows
                )
            elif is_parameter:
                weight = nn.Parameter(recipe.evaluate(), requires_grad=False)
            else:
                weight = recipe.evaluate()
            by_recipe[id(recipe)] = weight
        setattr(owner, attribute, by_recipe[id(recipe)])
    return model


def _rows(recipe: Recipe, numbers: Tensor) -> Tensor:
    """Some rows of a constant, in the order of their numbers."""
    others = tuple((0, size) for size in recipe.shape[1:])
    return torch.cat([recipe.part(((row, row + 1), *others)) for row in numbers.tolist()])
