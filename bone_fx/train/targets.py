"""What a configuration asks of a model: its targets, and what of it cannot be done."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from dataclasses import replace

from torch import nn

from bone_fx.config import ALL_LINEAR, BoneConfig
from bone_fx.default_targets import DEFAULT_TARGETS
from bone_fx.errors import SiteError, some
from bone_fx.sites import UNMATCHED, LinearSite, Refusal, is_excluded, is_target, trains_module

_HEADS = ("classifier", "score")
"""Heads that PEFT 0.18.1 trains whole for a classification task."""

_CLASSIFY = ("SEQ_CLS", "TOKEN_CLS")

_NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def with_default_targets(config: BoneConfig, model: nn.Module | None) -> BoneConfig:
    """The configuration, with PEFT's targets for the model's type where it names none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if config.target_modules is not None or model_type not in DEFAULT_TARGETS:
        return config
    return replace(config, target_modules=list(DEFAULT_TARGETS[model_type]))


def with_heads(config: BoneConfig, parameters: Collection[str]) -> BoneConfig:
    """The configuration, with the head that a classification task trains too, as in PEFT."""
    if config.task_type not in _CLASSIFY:
        return config
    heads = [h for h in _HEADS if any(f".{h}." in f".{n}" for n in parameters)]
    listed = dict.fromkeys([*(config.modules_to_save or ()), *heads])
    return replace(config, modules_to_save=list(listed))


def refuse_lists(config: BoneConfig, model: nn.Module | None) -> None:
    """Refuse an entry of `modules_to_save` that names a list of modules, which nothing calls.

    Raises:
        SiteError: The entry ends the name of one, as PEFT's rule has it.
    """
    named = [] if model is None else model.named_modules()
    lists = [n for n, m in named if isinstance(m, _NOT_CALLED) and n and trains_module(config, n)]
    if lists:
        raise SiteError(
            f"modules_to_save={config.modules_to_save} names {lists[0]}, a list of modules",
            expected="modules that are called",
            next_step="name the modules in it",
        )


def not_adapted(
    config: BoneConfig,
    model: nn.Module | None,
    adapted: Iterable[LinearSite],
    output_layers: Collection[str],
) -> list[Refusal]:
    """Modules of a model that a configuration targets and that got no block.

    Args:
        config: The configuration.
        model: The model; None has no modules.
        adapted: The sites with a block.
        output_layers: Names that `"all-linear"` leaves out.
    """
    if model is None:
        return []
    names, weights = set(), set()
    left_out = output_layers if config.target_modules == ALL_LINEAR else ()
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for site in adapted:
        names.add(site.name)
        weights.add(id(by_name.get(site.weight_name)))
    missed = []
    for name, module in model.named_modules():
        if not name or name in names or name in left_out or not is_target(config, name):
            continue
        weight = getattr(module, "weight", None)
        if id(weight) in weights:
            continue
        if isinstance(module, nn.Linear):
            missed.append(Refusal(name, "a linear layer that the model's forward does not reach"))
        elif config.target_modules != ALL_LINEAR:
            missed.append(Refusal(name, f"{type(module).__name__} is not a linear layer"))
    return missed


def refusals_of(
    config: BoneConfig, model: nn.Module | None, refused: Iterable[Refusal], missed: list[Refusal]
) -> list[Refusal]:
    """What was refused, each thing once, without entries that the configuration itself excludes.

    Args:
        config: The configuration.
        model: The model; None has no modules.
        refused: What choosing sites refused: parameters, and entries that matched none.
        missed: Modules that were targeted, with a better reason than such an entry's.
    """
    modules = [] if model is None else [name for name, _ in model.named_modules()]
    explained = [m for m in modules if is_excluded(config, m)] + [m.name for m in missed]
    told = []
    for refusal in refused:
        if refusal.name in _HEADS and config.task_type in _CLASSIFY:
            continue  # PEFT lists both heads, and a model has one
        entry = refusal.reason == UNMATCHED
        if not entry or not any(f".{name}".endswith(f".{refusal.name}") for name in explained):
            told.append(refusal)
    names = {refusal.name.removesuffix(".weight") for refusal in told}
    return told + [refusal for refusal in missed if refusal.name not in names]


def warn_of(refusals: Iterable[Refusal]) -> None:
    """Say what was asked for and not done; all of it stands in `adapted.refused`."""
    said = [str(refusal) for refusal in refusals]
    if said:
        warnings.warn(
            f"{len(said)} targets of the configuration were not adapted: "
            f"{some(said, separator='; ')} (all of them: adapted.refused)",
            stacklevel=2,
        )


def warn_if_nothing_is_excluded(config: BoneConfig, names: Iterable[str]) -> None:
    """Say that `exclude_modules` excluded nothing, as PEFT does."""
    if config.exclude_modules and not any(is_excluded(config, name) for name in names):
        warnings.warn(
            f"exclude_modules={config.exclude_modules} excluded nothing: no module has such a name",
            stacklevel=2,
        )
