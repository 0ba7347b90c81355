"""A plan of transformers' own checkpoint conversions: what on disk makes what in memory.

transformers 5 renames, splits, merges and stacks weights while it loads. This follows the steps of
its `core_model_loading.convert_and_load_state_dict_in_model` (5.23) with its own mapping objects,
but only notes what would be done; the same objects convert the tensors when a recipe is evaluated.
There is no list of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.loading_report import LoadStateDictInfo

from bone_fx.errors import BaseModelError
from bone_fx.weights.load_plan import LoadPlan, Source
from bone_fx.weights.recipes.recipe import Read


@dataclass
class _Group:
    """The tensors on disk that one converter takes together."""

    converter: WeightConverter
    slots: list[tuple[str, str]] = field(default_factory=list)
    """`(key on disk, source pattern)` in the order in which transformers collects them."""


def plan_loading(model: PreTrainedModel, stored: Mapping[str, Read]) -> LoadPlan:
    """How a checkpoint's tensors become a model's.

    Args:
        model: The model, with or without weights in memory.
        stored: The checkpoint's tensors under their names on disk.

    Raises:
        BaseModelError: A conversion cannot be applied to these tensors.
    """
    in_memory = model.state_dict(keep_vars=True)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    sources: dict[str, Source] = {}
    groups: dict[str, _Group] = {}
    unexpected: dict[str, str] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, in_memory
        )
        if name not in in_memory and key in in_memory:
            name, pattern = rename_source_key(key, [], [], model.base_model_prefix, in_memory)
        if name not in in_memory or (pattern is None and name in sources):
            unexpected[key] = name
        elif pattern is None:
            sources[name] = Source((key,))
        else:
            group = groups.setdefault(name, _Group(deepcopy(by_pattern[pattern])))
            group.slots.append((key, pattern))
    for name, group in groups.items():
        sources |= _converted(model, name, group, stored)
    info = _adjusted(model, set(in_memory) - set(sources), set(unexpected.values()))
    minded = {key: name for key, name in unexpected.items() if name in info.unexpected_keys}
    return LoadPlan(
        sources=sources,
        tied=dict(model.get_expanded_tied_weights_keys(all_submodels=True)),
        unexpected=minded,
        ignored={key: name for key, name in unexpected.items() if key not in minded},
        optional=frozenset(set(in_memory) - set(sources) - info.missing_keys),
    )


def _converted(
    model: PreTrainedModel, name: str, group: _Group, stored: Mapping[str, Read]
) -> dict[str, Source]:
    """The sources of everything a converter makes, found by running it on tensors without data."""
    keys = tuple(key for key, _ in group.slots)
    shells = [
        torch.empty(stored[key].shape, dtype=stored[keys[0]].dtype, device="meta") for key in keys
    ]
    try:
        results = _run(model, name, group, shells)
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BaseModelError(
            f"the checkpoint's tensors cannot be converted to {name}",
            expected=f"tensors that transformers' {group.converter!r} takes",
            found=f"{', '.join(keys[:4])}: {error}",
            next_step="use the complete checkpoint and the config.json that belongs to it",
        ) from error
    steps = ", ".join(repr(operation) for operation in group.converter.operations)
    indices = _indices(group)

    def source(part: _Group, target: str, slices: tuple[Source, ...] = ()) -> Source:
        keys = tuple(key for key, _ in part.slots)
        return Source(keys, _conversion(model, name, part, target), steps, slices)

    return {
        target: source(group, target, tuple(source(each, target) for each in indices))
        for target in results
    }


def _indices(group: _Group) -> list[_Group]:
    """What each index of the first dimension is made of, where tensors are stacked along it.

    As experts are: the first tensor of each pattern makes the first expert. What stands behind the
    stacking joins other dimensions.
    """
    stacks, *joins = group.converter.operations
    if not (isinstance(stacks, MergeModulelist) and stacks.dim == 0):
        return []
    if not all(isinstance(each, Concatenate) and each.dim > 0 for each in joins):
        return []
    by_pattern: dict[str, list[tuple[str, str]]] = {}
    for key, pattern in group.slots:
        by_pattern.setdefault(pattern, []).append((key, pattern))
    if len({len(slots) for slots in by_pattern.values()}) != 1:
        return []
    return [
        _Group(group.converter, list(slots)) for slots in zip(*by_pattern.values(), strict=True)
    ]


def _conversion(
    model: PreTrainedModel, name: str, group: _Group, target: str
) -> Callable[[Sequence[Tensor]], Tensor]:
    def convert(tensors: Sequence[Tensor]) -> Tensor:
        return _run(model, name, group, tensors)[target]

    return convert


def _run(
    model: PreTrainedModel, name: str, group: _Group, tensors: Sequence[Tensor]
) -> dict[str, Tensor]:
    converter = deepcopy(group.converter)
    for (key, pattern), tensor in zip(group.slots, tensors, strict=True):
        converter.add_tensor(name, key, pattern, cast(Any, tensor))  # annotated for its own loader
    results = converter.convert(name, model=model, config=model.config)
    return {
        target: value[0] if isinstance(value, list) else value for target, value in results.items()
    }


def _adjusted(model: PreTrainedModel, missing: set[str], unexpected: set[str]) -> LoadStateDictInfo:
    """What is missing and unexpected once transformers has taken out what it does not mind."""
    info = LoadStateDictInfo(
        missing_keys=missing,
        unexpected_keys=unexpected,
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model._adjust_missing_and_unexpected_keys(info)
    return info
