"""`generate` while training: an eager twin of the model with folded weights, kept up to date.

A graph of one forward has no cache of keys and values. So the model's own class generates, with the
adapters folded into its weights; all other weights share the memory of this module's. The twin is
made once. Where blocks changed since, their layers alone are folded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.errors import UsageError
from bone_fx.passes.fold import fold_weight
from bone_fx.sites import LinearSite
from bone_fx.train.mounting import named_buffers
from bone_fx.train.verbs.merging import Merging

Place = tuple[int, torch.dtype, torch.device]
"""Where the values of a parameter lie."""


@dataclass
class _Twin:
    """A folded copy of the model, and what it was folded from.

    Attributes:
        model: The copy.
        adapters: Names of the adapters in it, in the order in which they apply.
        sites: The layers that they have blocks at.
        places: Where the base's parameters lie; the copy shares those that no adapter touches.
        values: Blocks by adapter and layer, and parameters that adapters bring whole by name, as
            they were.
        versions: How often the weight of each layer with a block was written to.
    """

    model: nn.Module
    adapters: list[str]
    sites: list[LinearSite]
    places: list[Place]
    values: dict[tuple[str, str], Tensor]
    versions: dict[str, int]


class Generating(Merging):
    """An adapter set that generates, with the current values of its blocks."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model's own `generate` does, under the active adapters.

        The model's class runs with folded weights and a cache of keys and values: the first call
        costs what `merge_and_unload()` does, a later one folds the layers whose blocks changed. The
        folded weights are a copy of the adapted layers' until the adapters change.

        Args:
            *args: As `transformers.GenerationMixin.generate` takes them.
            **kwargs: The same.

        Returns:
            What the model's `generate` returns: token ids `[B, T]`, or its output class.

        Raises:
            FoldError: A folded weight holds NaN or Inf.
            UsageError: The model does not generate, or this module is sharded.

        Example:
            >>> adapted.generate(**tokens, max_new_tokens=20)  # doctest: +SKIP

            Skipped as a doctest: it needs a language model; the tests run it.
        """
        model: Any = self._origin.model
        if not callable(getattr(model, "generate", None)):
            raise UsageError(
                f"{type(model).__name__} has no generate",
                expected="a transformers model that generates",
            )
        twin: Any = self._folded_twin()
        twin.generation_config = self.generation_config
        return twin.generate(*args, **kwargs)

    def _folded_twin(self) -> nn.Module:
        """The model's own class with the weights that this module computes with now."""
        if self.is_sharded:
            raise UsageError(
                "a sharded module does not generate: no process has all weights",
                next_step="save_pretrained, and load the adapter where there is one process",
            )
        adapters = [] if self._disabled else list(self._merged or self.active_adapters)
        twin: _Twin | None = self.__dict__.get("_twin")
        if twin is None or (twin.adapters, twin.places) != (adapters, self._places()):
            self.__dict__["_twin"] = twin = self._new_twin(adapters)
        else:
            self._refresh(twin)
        own = named_buffers(self)
        for name, buffer in twin.model.named_buffers(remove_duplicate=False):
            if name in own:  # statistics
                buffer.copy_(own[name])
        return twin.model.train(self.training)

    def _new_twin(self, adapters: list[str]) -> _Twin:
        model = self.merge_and_unload(adapter_names=adapters)
        sites = self._touched(adapters)
        values = {key: value.clone() for key, value in self._folded_from(adapters).items()}
        return _Twin(model, adapters, sites, self._places(), values, self._versions(sites))

    def _refresh(self, twin: _Twin) -> None:
        """Fold again where a block or the weight under it changed."""
        values, versions = self._folded_from(twin.adapters), self._versions(twin.sites)
        changed = {
            key
            for key, value in values.items()
            if key not in twin.values or not torch.equal(value, twin.values[key])
        }
        with torch.no_grad():
            for site in twin.sites:
                if versions[site.name] == twin.versions[site.name] and not any(
                    (adapter, site.name) in changed for adapter in twin.adapters
                ):
                    continue
                steps = [
                    (adapter.config.method, adapter.blocks[site.name].detach())
                    for adapter in map(self._adapter, twin.adapters)
                    if site.name in adapter.blocks
                ]
                weight = self._base.get_parameter(site.weight_name).detach()
                folded = fold_weight(weight, steps, transposed=site.transposed, layer=site.name)
                twin.model.get_parameter(site.weight_name).copy_(folded)
            for name, parameter in self._saved(twin.adapters).items():
                if ("", name) in changed:
                    twin.model.get_parameter(name).copy_(parameter)
        twin.values.update({key: values[key].clone() for key in changed})
        twin.versions = versions

    def _folded_from(self, adapters: list[str]) -> dict[tuple[str, str], Tensor]:
        """The values that folding reads: of blocks by adapter and layer, and whole ones by name.

        They are compared, not counted: `parameter.data` is written to without a trace.
        """
        blocks = {
            (name, site): block.detach()
            for name in adapters
            for site, block in self._adapter(name).blocks.items()
        }
        return blocks | {("", n): p.detach() for n, p in self._saved(adapters).items()}

    def _places(self) -> list[Place]:
        parameters = self._base.named_parameters(remove_duplicate=False)
        return [(p.data_ptr(), p.dtype, p.device) for _, p in parameters]

    def _versions(self, sites: list[LinearSite]) -> dict[str, int]:
        return {site.name: self._base.get_parameter(site.weight_name)._version for site in sites}
