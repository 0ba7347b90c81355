"""Verbs on weights: what an adapter adds, folding, merging, and the model without adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, fx, nn

from bone_fx.errors import UsageError
from bone_fx.graphs import container
from bone_fx.passes import fold_adapters
from bone_fx.train.adapter_set import AdapterSet
from bone_fx.train.folded import FoldedModule
from bone_fx.train.mounting import (
    carry_buffers,
    delta_weight,
    named_buffers,
    with_parameters,
)


class Merging(AdapterSet):
    """An adapter set whose adapters can become part of weights."""

    def get_delta_weight(self, site: str, adapter_name: str = "default") -> Tensor:
        """What an adapter adds to a layer's weight, float32, in the weight's own layout.

        A BAT adapter acts on the weight that it receives: the base under the active adapters before
        it.
        """
        adapter = self._adapter(adapter_name)
        if site not in adapter.blocks:
            raise UsageError(
                f"adapter {adapter_name!r} has no block at {site!r}",
                expected=f"one of {list(adapter.blocks)[:5]}",
            )
        active = self.active_adapters
        before = active[: active.index(adapter_name)] if adapter_name in active else []
        return delta_weight(self._base, site, adapter, [self._adapters[name] for name in before])

    def fold(self, adapters: str | Sequence[str] | None = None) -> fx.GraphModule:
        """A plain GraphModule with the adapters folded into constant weights.

        This module stays as it is.

        Args:
            adapters: Names in the order in which they apply; None for the active ones.

        Returns:
            A `FoldedModule`, called like the model; its `state_dict()` has the base's names.

        Raises:
            FoldError: A folded weight holds NaN or Inf.
            UsageError: Two of the adapters trained one module whole.
        """
        names = self._named(adapters)
        self._refuse_two_heads(names)
        carry_buffers(named_buffers(self), self._base)
        result = fold_adapters(self._inserted(names)).graph_module
        for name, parameter in self._saved(names).items():
            owner, leaf = container(result, name)
            trained = nn.Parameter(
                parameter.detach().clone(), requires_grad=parameter.requires_grad
            )
            owner.register_parameter(leaf, trained)
        return FoldedModule(result, self._origin.signature, training=self.training)

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters whose folded weights stand in place of their nodes."""
        return list(self._merged)

    def merge_adapter(
        self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = True
    ) -> None:
        """Put folded weights in place of adapters, besides those that are merged already.

        The base's own bytes are kept for `unmerge_adapter`.

        Args:
            adapter_names: Names in the order in which they apply; None for the active ones.
            safe_merge: Taken as PEFT takes it; folded weights are always checked.

        Raises:
            FoldError: A folded weight holds NaN or Inf; nothing is changed.
            UsageError: Two of the adapters trained one module whole.
        """
        new = [name for name in self._named(adapter_names) if name not in self._merged]
        if self._merged and not new:
            warnings.warn("these adapters are merged already: nothing changes", stacklevel=2)
            return
        if self._merged:
            warnings.warn(f"{self._merged} are merged already; {new} join them", stacklevel=2)
        self._refuse_two_heads([*self._merged, *new])
        with self._change():
            self._merged = [*self._merged, *new]

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back, bit for bit, and the adapters their nodes."""
        if not self._merged:
            warnings.warn("no adapter is merged: nothing changes", stacklevel=2)
            return
        with self._change():
            self._merged = []

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: str | Sequence[str] | None = None,
    ) -> nn.Module:
        """The original model class with folded weights, ready for `generate` and `save_pretrained`.

        The model that was adapted is not changed; weights that no adapter touches share its memory,
        or this module's where that is a copy, was moved or was cast.

        Args:
            progressbar: Taken as PEFT takes it.
            safe_merge: Taken as PEFT takes it; folded weights are always checked.
            adapter_names: Names in the order in which they apply; None for those that are merged,
                or else the active ones.

        Raises:
            FoldError: A folded weight holds NaN or Inf.
            UsageError: This module was not made from a model.
        """
        merged = self._merged or None
        chosen = self._named(merged if adapter_names is None else adapter_names)
        folded = self.fold(chosen)
        names = {site.weight_name for site in self._touched(chosen)} | set(self._saved(chosen))
        return with_parameters(self._model(), folded, names).train(self.training)

    def unload(self) -> nn.Module:
        """The original model class without blocks; what active adapters trained whole stays.

        The model that was adapted is not changed; other weights share its memory.

        Raises:
            UsageError: This module was not made from a model.
        """
        carry_buffers(named_buffers(self), self._base)
        source, saved = self.fold([]), self._saved(self.active_adapters)
        for name, parameter in saved.items():
            owner, leaf = container(source, name)
            owner.register_parameter(leaf, parameter)
        return with_parameters(self._model(), source, saved).train(self.training)

    def _model(self) -> nn.Module:
        if self._origin.model is None:
            raise UsageError(
                "there is no model to give back", next_step="use fold(), which gives a GraphModule"
            )
        return self._origin.model
