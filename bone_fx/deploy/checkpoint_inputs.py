"""A base and its adapters, up to the folded recipes: what every export of a checkpoint starts with.

`open_checkpoint` reads configurations and headers and decides on the model's class;
`CheckpointInputs.fold` builds the model without weights and folds the adapters into the recipes of
its constants. No weight is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bone_fx.adapter_folder import Adapters
from bone_fx.deploy.trained.heads import (
    TrainedHeads,
    brought_tensors,
    concern_heads,
    replaced_rows,
    trained_heads,
    trained_labels,
    without_unused,
)
from bone_fx.deploy.trained.sites import adapted_sites, with_parameters
from bone_fx.errors import AdapterError
from bone_fx.sites import LinearSite
from bone_fx.weights.recipes.change import Change
from bone_fx.weights.recipes.recipe import Recipe, rounded
from bone_fx.weights.recipes.rounding import Rounding

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from bone_fx.base.loading import BaseCheckpoint, Skeleton

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Dtypes of activations by their names."""

_HEAD_WEIGHTS = ("classifier.weight", "score.weight", "out_proj.weight")


@dataclass(frozen=True)
class CheckpointInputs:
    """A base, its adapters, and the model class that both make.

    Attributes:
        checkpoint: The base model.
        adapters: The adapters by name, in the order in which they apply.
        architecture: The model's class.
        overrides: Fields of the configuration that the adapters' heads decide.
        heads: Parameters that come from the adapters.
        untied: Parameters that get a tensor of their own though the model ties them.
        new_biases: Those of the heads that the base's layers lack.
        allow_unused: Patterns of tensors that the person gives up.
        notes: What a person should know about the adapters' files.
    """

    checkpoint: BaseCheckpoint
    adapters: Adapters
    architecture: type[PreTrainedModel]
    overrides: Mapping[str, Any]
    heads: Mapping[str, Tensor]
    untied: frozenset[str] = frozenset()
    new_biases: frozenset[str] = frozenset()
    allow_unused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model under its adapters."""
        from bone_fx.base.architectures import with_overrides

        untied = {"tie_word_embeddings": False} if self.untied else {}
        return with_overrides(self.checkpoint.config, {**self.overrides, **untied})

    def fold(self, dtype: torch.dtype, rounding: Rounding | None = None) -> FoldedCheckpoint:
        """Build the model without weights and fold the adapters into its recipes.

        Args:
            dtype: Floating dtype of the parameters.
            rounding: Measures what the cast of each folded weight costs.

        Raises:
            BaseModelError: The model cannot be built, a parameter has no bytes, or a tensor no use.
            AdapterError: An adapter does not fit the base.
        """
        from bone_fx.base.loading import skeleton
        from bone_fx.base.unused_tensors import account_for_unused
        from bone_fx.lora.biases import add_biases
        from bone_fx.weights.apply_adapters import fold_recipes, replace_rows
        from bone_fx.weights.load_plan import recipes_for

        shell = skeleton(
            self.checkpoint,
            dtype,
            architecture=self.architecture,
            config_overrides=self.overrides,
            untie=self.untied,
        )
        add_biases(shell.model, self.heads)
        sites = adapted_sites(shell.model, self.adapters)
        recipes = recipes_for(*shell, self.checkpoint.tensors, extra=self.heads)
        left_out = account_for_unused(
            *shell, self.checkpoint.tensors, self.allow_unused, self.checkpoint.unread
        )
        change = Change()
        recipes = fold_recipes(recipes, sites, self.adapters, rounding, change)
        for name, rows in replaced_rows(self.adapters, recipes).items():
            recipes = replace_rows(recipes, name, rows.tokens, rows.values)
        notes = (*self.notes, *left_out)
        return FoldedCheckpoint(self, shell, sites, recipes, rounding, change, notes)


@dataclass(frozen=True)
class FoldedCheckpoint:
    """A model without weights, and the folded recipe of each of its constants.

    Attributes:
        inputs: The base and the adapters.
        skeleton: The model, and how the checkpoint's names become its own.
        sites: The adapted sites by name.
        recipes: Recipe by parameter name, the adapters folded in.
        rounding: What the cast of the folded weights costs; None where it costs nothing, or where
            it is not asked for.
        change: How far the adapters move each weight.
        notes: What a person should know: tensors that are left out.
    """

    inputs: CheckpointInputs
    skeleton: Skeleton
    sites: Mapping[str, LinearSite]
    recipes: Mapping[str, Recipe]
    rounding: Rounding | None
    change: Change
    notes: tuple[str, ...] = ()

    def rounded_to(self, dtype: torch.dtype) -> FoldedCheckpoint:
        """The same with every weight rounded to a dtype on its way to its own."""
        return replace(self, recipes=rounded(self.recipes, dtype))


def open_checkpoint(
    base: str | Path,
    adapters: Adapters,
    *,
    trust_remote_code: bool,
    revision: str | None,
    allow_unused: Sequence[str] = (),
) -> CheckpointInputs:
    """Open a base, start to hash its files, and choose the class that the adapters ask for.

    Raises:
        BaseModelError: There is no usable model.
        AdapterError: The adapters were trained for different tasks, bring different heads, or hold
            tensors that have no use.
    """
    from bone_fx.base.loading import open_base
    from bone_fx.base.padding import missing_padding

    checkpoint = open_base(base, trust_remote_code=trust_remote_code, revision=revision)
    checkpoint.start_hashing()
    architecture = _architecture(checkpoint, adapters)
    folders = [*(adapter.path for _, adapter in adapters), checkpoint.folder]
    overrides: dict[str, Any] = missing_padding(checkpoint.config, architecture, folders)
    model, heads, labels = None, TrainedHeads(), dict[str, Any]()
    if concern_heads(adapters):
        from bone_fx.base.architectures import with_overrides
        from bone_fx.base.skeleton import meta_model

        classes = _classes(architecture, brought_tensors(adapters))
        if classes is not None:
            if classes != checkpoint.config.num_labels:
                overrides["num_labels"] = classes
            labels = trained_labels(adapters, classes)
            overrides |= labels
        config = with_overrides(checkpoint.config, overrides)
        model = meta_model(config, torch.float32, architecture)
        adapters = [(label, with_parameters(adapter, model)) for label, adapter in adapters]
    adapters, notes = without_unused(adapters, allow_unused, model)
    if labels:
        notes.append("names of the classes: from config.json of an adapter")
    if model is not None:
        heads = trained_heads(model, adapters)
        overrides |= heads.overrides()
    return CheckpointInputs(
        checkpoint,
        adapters,
        architecture,
        overrides,
        heads.tensors,
        heads.untied,
        heads.new_biases,
        tuple(allow_unused),
        tuple(notes),
    )


def _task(adapters: Adapters) -> str | None:
    """PEFT's name of the task that the adapters were trained for; None if none says."""
    tasks = {adapter.config.task_type for _, adapter in adapters if adapter.config.task_type}
    if len(tasks) > 1:
        raise AdapterError(
            f"the adapters were trained for different tasks: {', '.join(sorted(tasks))}",
            expected="one task",
            next_step="export them one by one",
        )
    return next(iter(tasks), None)


def _architecture(checkpoint: BaseCheckpoint, adapters: Adapters) -> type[PreTrainedModel]:
    """The class for a task: the checkpoint's own if it names one that generates.

    Without a task it is the class that PEFT noted, if it is another of the same model.
    """
    from bone_fx.base.architectures import named_architecture
    from bone_fx.base.loading import architecture_for_task

    task = _task(adapters)
    if task is None:
        noted = (adapter.config.auto_mapping for _, adapter in adapters)
        names = [note.get("base_model_class") for note in noted if isinstance(note, Mapping)]
        trained = named_architecture(checkpoint.config, names[0]) if names else None
        return trained or checkpoint.architecture
    generates = (
        task == "CAUSAL_LM"
        and bool(checkpoint.config.architectures)
        and checkpoint.architecture.__name__.endswith(("CausalLM", "LMHeadModel"))
    )
    return checkpoint.architecture if generates else architecture_for_task(checkpoint, task)


def _classes(architecture: type[PreTrainedModel], heads: Mapping[str, Tensor]) -> int | None:
    """Classes of a head that the adapters bring; None if they bring none that classifies."""
    labels = next((len(t) for name, t in heads.items() if name.endswith(_HEAD_WEIGHTS)), None)
    return labels if architecture.__name__.endswith("Classification") else None
