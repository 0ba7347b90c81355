"""What a fold changes in a checkpoint, under the names that `from_pretrained` reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bone_fx.deploy.checkpoint_inputs import CheckpointInputs, FoldedCheckpoint
from bone_fx.errors import LOOK, FoldError, VerificationError, some
from bone_fx.weights.load_plan import LoadPlan, Source
from bone_fx.weights.recipes.fold_recipe import Fold
from bone_fx.weights.recipes.recipe import Read, Recipe, Value, cast, without_cast
from bone_fx.weights.recipes.stack import Stack


@dataclass(frozen=True)
class ChangedTensors:
    """Tensors of a checkpoint that a fold writes anew, or for the first time.

    Attributes:
        recipes: Recipe by name on disk.
        keys: Name on disk by name in the model.
    """

    recipes: Mapping[str, Recipe]
    keys: Mapping[str, str]


def changed_tensors(folded: FoldedCheckpoint, usual: torch.dtype) -> ChangedTensors:
    """Folded weights, heads, and what was tied and has to be written apart.

    Each is in the dtype that it is stored in.

    Args:
        folded: The folded checkpoint.
        usual: Dtype of tensors that the checkpoint does not have.

    Raises:
        FoldError: A tensor is not stored as the model has it, or untying changes the model.
    """
    inputs, plan = folded.inputs, folded.skeleton.plan
    if inputs.untied and inputs.checkpoint.config.is_encoder_decoder:
        raise FoldError(
            f"{inputs.architecture.__name__} cannot be untied in a checkpoint: "
            "tie_word_embeddings also decides how its outputs are scaled",
            found=f"trained apart: {', '.join(sorted(inputs.untied))}",
            next_step="export it with bone-export",
        )
    # tie_word_embeddings is one field: false, it unties every pair of the model.
    untied = {*plan.tied, *plan.tied.values()} if inputs.untied else set()
    if inputs.new_biases:
        raise FoldError(
            f"{inputs.architecture.__name__} has no place for {sorted(inputs.new_biases)[0]}",
            expected="layers that have a bias, where lora_bias adds to it",
            found=some(sorted(inputs.new_biases)),
            next_step="export it with bone-export, which gives these layers a bias",
        )
    weights = {site.weight_name: name for name, site in folded.sites.items()}
    others = [f"{name}.bias" for name in _sites_of(inputs, "biases")]
    others += [f"{name}.weight" for name in _sites_of(inputs, "rows")]
    recipes: dict[str, Recipe] = {}
    keys: dict[str, str] = {}
    for name in dict.fromkeys([*weights, *others, *inputs.heads, *sorted(untied)]):
        recipe, source = folded.recipes[name], plan.sources.get(name)
        if isinstance(recipe, Stack) and source is not None and source.slices:
            recipes |= _apart(recipe, source, inputs.checkpoint.tensors)
            continue
        key = keys[name] = _key_on_disk(name, plan, untied=name in untied)
        stored = inputs.checkpoint.tensors.get(key)
        dtype = usual if stored is None else stored.dtype
        if isinstance(recipe, Fold):
            if not isinstance(recipe.base, Read | Value):
                raise _converted(weights[name], recipe.describe())
            recipes[key] = replace(recipe, to=dtype)
        elif isinstance(recipe, Stack):
            each = [replace(one, to=dtype) for one in recipe.recipes if isinstance(one, Fold)]
            recipes[key] = Stack(tuple(each))
        elif name in others:
            recipes[key] = cast(without_cast(recipe), dtype)
        elif name in inputs.heads:
            recipes[key] = cast(Value(inputs.heads[name], "adapter's"), dtype)
        elif stored is None:  # untied, and as it was
            recipes[key] = without_cast(recipe)
    return ChangedTensors(recipes, keys)


def _sites_of(inputs: CheckpointInputs, part: str) -> list[str]:
    """Layers that an adapter has something for."""
    return [name for _, adapter in inputs.adapters for name in getattr(adapter, part)]


def _apart(stack: Stack, source: Source, stored: Mapping[str, Read]) -> dict[str, Recipe]:
    """Folded experts as the checkpoint keeps them: each tensor of each expert by itself.

    Before: W `[E, O, I]`, of which `W[e]` is stored as tensors that are joined along O or I.
    After:  each of these tensors, folded with its part of the expert's block.
    """
    recipes: dict[str, Recipe] = {}
    for fold, part in zip(stack.recipes, source.slices, strict=True):
        assert isinstance(fold, Fold)
        shapes = [stored[key].shape for key in part.keys]
        whole = list(fold.shape)
        dim = next((d for d in (0, 1) if sum(shape[d] for shape in shapes) == whole[d]), None)
        start = 0
        for key, shape in zip(part.keys, shapes, strict=True):
            if dim is None or shape[1 - dim] != whole[1 - dim] or fold.transposed:
                raise _converted(fold.site, f"{', '.join(part.keys[:3])} -> {part.label}")
            box = [(0, length) for length in whole]
            box[dim] = (start, start + shape[dim])
            start += shape[dim]
            steps = tuple(step.part(box[0], box[1]) for step in fold.steps)
            read = stored[key]
            recipes[key] = replace(fold, base=read, steps=steps, to=read.dtype)
    return recipes


def check_names(folder: Path, folded: FoldedCheckpoint, changes: ChangedTensors) -> None:
    """Compare what transformers loads into each changed parameter with what was written for it.

    Raises:
        VerificationError: A parameter gets another tensor, or none, or a tensor has no use.
    """
    from bone_fx.base.loaded_names import names_as_loaded
    from bone_fx.base.loading import open_base

    inputs, plan = folded.inputs, folded.skeleton.plan
    written = open_base(folder, trust_remote_code=inputs.checkpoint.trust_remote_code)
    converted = {name for name, source in plan.sources.items() if source.convert is not None}
    loaded = names_as_loaded(
        written,
        inputs.architecture,
        {key for name in converted for key in plan.sources[name].keys},
    )
    for name, key in changes.keys.items():
        if loaded.keys.get(name) != key:
            raise _misnamed(name, key, str(loaded.keys.get(name)))
    for name in loaded.missing - converted:
        if plan.source_name(name) is not None or name in inputs.heads:
            raise _misnamed(name, "the base's or the adapter's tensor", "none")
    known = {*plan.unexpected, *plan.unexpected.values()}
    for name in loaded.unexpected - known:
        raise _misnamed(name, "a parameter of the model", "none")


def _key_on_disk(name: str, plan: LoadPlan, *, untied: bool) -> str:
    """The name of the tensor that a parameter is loaded from; its own if there is none yet."""
    source = plan.sources.get(name)
    if source is None and not untied:
        alias = plan.source_name(name)
        source = None if alias is None else plan.sources[alias]
    if source is None:
        return name
    if source.convert is not None:
        raise _converted(name, f"{', '.join(source.keys[:3])} -> {source.label}")
    return source.keys[0]


def _converted(name: str, how: str) -> FoldError:
    return FoldError(
        f"{name} has no tensor of its own in the checkpoint: {how}",
        expected="a weight that is stored as the model has it",
        next_step="export it with bone-export, or save the base with transformers first",
    )


def _misnamed(name: str, expected: str, found: str) -> VerificationError:
    return VerificationError(
        f"verification failed: transformers does not load what was written for {name}",
        expected=expected,
        found=found,
        next_step=f"{LOOK}; please report it",
    )
