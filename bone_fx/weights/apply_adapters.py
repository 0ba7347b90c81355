"""Folding without weights in memory: each adapted weight's recipe is wrapped in its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from bone_fx.adapters import METHODS
from bone_fx.config import BoneConfig
from bone_fx.errors import AdapterError
from bone_fx.sites import LinearSite
from bone_fx.weights.recipes.change import Change
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import Recipe, without_cast
from bone_fx.weights.recipes.rounding import Rounding


class Adapter(Protocol):
    """What folding needs of a trained adapter (`bone_fx.adapter_folder.AdapterFolder`)."""

    @property
    def config(self) -> BoneConfig:
        """Its configuration: method and block size."""

    @property
    def blocks(self) -> Mapping[str, Tensor]:
        """Block by site name."""


def fold_recipes(
    recipes: Mapping[str, Recipe],
    sites: Mapping[str, LinearSite],
    adapters: Sequence[tuple[str, Adapter]],
    rounding: Rounding | None = None,
    change: Change | None = None,
) -> dict[str, Recipe]:
    """Recipes with adapters folded in; the given ones stay as they are.

    Folding starts from the stored bytes: a cast at the end of a base recipe is taken off, blocks
    act in float32 in the order of the list, and the result is rounded once, to the recipe's
    dtype.

    Args:
        recipes: Recipe by parameter name.
        sites: The sites that the adapters target, by name.
        adapters: Name and content of each adapter, in the order in which they act (bat depends on
            it).
        rounding: Told what the cast of each folded weight costs.
        change: Told how far the adapters move each weight.

    Raises:
        AdapterError: A block has no site, a site no block, a shape differs, or the weight belongs
            to another layer too.
    """
    _check_covered(sites, adapters)
    folded = dict(recipes)
    for name, site in sites.items():
        base = recipes.get(site.weight_name)
        if base is None:
            raise AdapterError(
                f"{name} has no weight called {site.weight_name}",
                found=f"{len(recipes)} parameters",
                next_step="use the base model that the adapter was trained on",
            )
        _check_alone(site, recipes)
        steps = tuple(
            FoldStep(adapter.config.method, _fitting(site, adapter, label), label)
            for label, adapter in adapters
            if name in adapter.blocks
        )
        folded[site.weight_name] = Fold(
            without_cast(base), steps, site.transposed, base.dtype, name, rounding, change
        )
    return folded


def _check_covered(
    sites: Mapping[str, LinearSite], adapters: Sequence[tuple[str, Adapter]]
) -> None:
    for label, adapter in adapters:
        foreign = [name for name in adapter.blocks if name not in sites]
        if foreign:
            raise AdapterError(
                f"adapter {label!r} has {len(foreign)} blocks for layers that this model has not",
                expected=f"layers such as {', '.join(list(sites)[:3]) or 'none'}",
                found=", ".join(foreign[:3]),
                next_step="use the base model that the adapter was trained on",
            )
    bare = [name for name in sites if not any(name in adapter.blocks for _, adapter in adapters)]
    if bare:
        raise AdapterError(
            f"{len(bare)} targeted layers have no block in any adapter",
            expected=f"a block for {', '.join(bare[:3])}",
            found=f"blocks of {', '.join(label for label, _ in adapters) or 'no adapter'}",
            next_step="check that the adapter's file is whole",
        )


def _fitting(site: LinearSite, adapter: Adapter, label: str) -> Tensor:
    config, block = adapter.config, adapter.blocks[site.name]
    method = METHODS[config.method]
    reason = method.refusal(site.in_features, site.out_features, config.r, config.mini_r)
    if reason is not None:
        raise AdapterError(
            f"adapter {label!r} cannot fit {site.name}",
            found=reason,
            next_step="use the base model that the adapter was trained on",
        )
    expected = method.block_shape(site.in_features, site.out_features, config.r, config.mini_r)
    if tuple(block.shape) != tuple(expected):
        raise AdapterError(
            f"the block of adapter {label!r} for {site.name} has the wrong shape",
            expected=f"{list(expected)} for {config.method} with r={config.r}",
            found=list(block.shape),
            next_step="use the base model that the adapter was trained on",
        )
    return block


def _check_alone(site: LinearSite, recipes: Mapping[str, Recipe]) -> None:
    base = recipes[site.weight_name]
    partners = [
        name for name, recipe in recipes.items() if recipe is base and name != site.weight_name
    ]
    if partners:
        raise AdapterError(
            f"{site.name} is adapted, but its weight is tied to {', '.join(partners)}",
            expected="a weight of its own",
            next_step="untie the weight, or train without this target",
        )
    stored = (
        (site.in_features, site.out_features)
        if site.transposed
        else (site.out_features, site.in_features)
    )
    if base.shape != stored:
        raise AdapterError(
            f"the weight of {site.name} has another shape",
            expected=list(stored),
            found=list(base.shape),
            next_step="use the config.json that belongs to the weights of the base",
        )
