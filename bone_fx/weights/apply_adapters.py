"""Folding without weights in memory: each adapted weight's recipe is wrapped in its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bone_fx.adapters import Block, LowRank
from bone_fx.errors import AdapterError
from bone_fx.sites import LinearSite
from bone_fx.weights.recipes.change import Change
from bone_fx.weights.recipes.fold_recipe import Fold, FoldStep
from bone_fx.weights.recipes.recipe import Converted, Recipe, cast, without_cast
from bone_fx.weights.recipes.rounding import Rounding
from bone_fx.weights.recipes.rows import ReplacedRows
from bone_fx.weights.recipes.stack import Entry, Stack


class Config(Protocol):
    """What folding needs of a configuration."""

    @property
    def method(self) -> str:
        """Row of `bone_fx.adapters.METHODS`."""


class Adapter(Protocol):
    """What folding needs of a trained adapter (`bone_fx.adapter_folder.AdapterFolder`)."""

    @property
    def config(self) -> Config:
        """Its configuration."""

    @property
    def blocks(self) -> Mapping[str, Block]:
        """Block by site name."""

    @property
    def biases(self) -> Mapping[str, Tensor]:
        """What is added to a layer's bias, by site name."""

    def misfit(self, site: LinearSite) -> str | None:
        """Why the block of a site does not fit its layer; None if it does."""


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
        adapters: Name and content of each adapter, in the order in which they act (bat and DoRA
            depend on it).
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
        _check_lengths(site, steps)
        fold = _Folded(site, steps, base.dtype, rounding, change)
        folded[site.weight_name] = fold.of(without_cast(base))
        added = [adapter.biases[name] for _, adapter in adapters if name in adapter.biases]
        if added:
            bias = f"{name}.bias"
            folded[bias] = _biased(recipes[bias], added)
    return folded


def replace_rows(
    recipes: Mapping[str, Recipe], name: str, numbers: tuple[int, ...], rows: Tensor
) -> dict[str, Recipe]:
    """Recipes with rows in the place of some of a table's; a tied table follows.

    Args:
        recipes: Recipe by parameter name.
        name: The table.
        numbers: The rows that are replaced.
        rows: What comes in their place.
    """
    base = recipes[name]
    table = cast(without_cast(base), rows.dtype)
    replaced = cast(ReplacedRows(table, numbers, rows), base.dtype)
    return {key: replaced if recipe is base else recipe for key, recipe in recipes.items()}


@dataclass(frozen=True)
class _Folded:
    """How the weight of a site is folded: its steps, and where its measurements go."""

    site: LinearSite
    steps: tuple[FoldStep, ...]
    dtype: torch.dtype
    rounding: Rounding | None
    change: Change | None

    def of(self, base: Recipe) -> Recipe:
        """The folded weight; of stacked ones each by itself."""
        if not self.site.experts:
            return self._one(base, self.steps)
        numbers = range(self.site.experts)
        return Stack(tuple(self._one(Entry(base, n), self._steps_of(n), n) for n in numbers))

    def _one(self, base: Recipe, steps: tuple[FoldStep, ...], number: int = 0) -> Fold:
        site = self.site
        return Fold(
            base, steps, site.transposed, self.dtype, site.name, self.rounding, self.change, number
        )

    def _steps_of(self, number: int) -> tuple[FoldStep, ...]:
        blocks = [(step, step.block) for step in self.steps]
        return tuple(
            FoldStep(step.method, block.expert(number), step.adapter)
            for step, block in blocks
            if isinstance(block, LowRank)
        )


def _biased(base: Recipe, added: Sequence[Tensor]) -> Recipe:
    """A bias and what LoRAs add to it, in float32, rounded once."""
    exact = cast(without_cast(base), torch.float32)
    total = torch.stack(list(added)).sum(0)
    biased = Converted((exact,), lambda tensors: tensors[0] + total, base.shape, "add lora_bias")
    return cast(biased, base.dtype)


def _check_lengths(site: LinearSite, steps: Sequence[FoldStep]) -> None:
    """Refuse a second DoRA on a layer: in PEFT both measure the weight before either acts."""
    doras = [step.adapter for step in steps if step.method == "dora"]
    if len(doras) > 1:
        raise AdapterError(
            f"{site.name} has two DoRA adapters, {doras[0]!r} and {doras[1]!r}",
            expected="one, which says how long the rows of the weight are",
            next_step="fold one of them into the base first, and train the other on that",
        )


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


def _fitting(site: LinearSite, adapter: Adapter, label: str) -> Block:
    reason = adapter.misfit(site)
    if reason is not None:
        raise AdapterError(
            f"the block of adapter {label!r} for {site.name} has the wrong shape",
            expected=f"one for a layer {site.in_features} -> {site.out_features}",
            found=reason,
            next_step="use the base model that the adapter was trained on",
        )
    return adapter.blocks[site.name]


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
    stack = (site.experts,) if site.experts else ()
    matrix = (site.out_features, site.in_features)
    stored = (*stack, *(matrix[::-1] if site.transposed else matrix))
    if base.shape != stored:
        raise AdapterError(
            f"the weight of {site.name} has another shape",
            expected=list(stored),
            found=list(base.shape),
            next_step="use the config.json that belongs to the weights of the base",
        )
