"""The rest of PEFT's verbs: which adapters act and train, combinations, and names it goes by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bone_fx.adapters import METHODS
from bone_fx.config import BoneConfig
from bone_fx.errors import UsageError
from bone_fx.train.mounting import MountedAdapter, refuse_taken_name
from bone_fx.train.verbs.recognised import Recognised


class TunerView:
    """What PEFT calls `base_model`: the tuner, whose `model` is the model.

    Everything but `model` is the adapted module's.
    """

    def __init__(self, adapted: PeftVerbs) -> None:
        self._adapted = adapted

    @property
    def model(self) -> nn.Module:
        """The model that was adapted, without adapters."""
        return self._adapted.get_base_model()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapted, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The adapted module's call."""
        return self._adapted(*args, **kwargs)


class PeftVerbs(Recognised):
    """An adapter set with PEFT's names for what it has, and its small verbs."""

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter, or names where there is not exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else self.active_adapters

    @property
    def active_peft_config(self) -> BoneConfig:
        """Configuration of the first active adapter.

        Raises:
            UsageError: No adapter is active.
        """
        if not self.active_adapters:
            raise UsageError("no adapter is active", next_step="set_adapter(name)")
        return self._adapter(self.active_adapters[0]).config

    @property
    def peft_type(self) -> str:
        """`"BONE"` or `"MISS"`, of the first active adapter."""
        return str(self.active_peft_config.peft_type)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Entries of `modules_to_save` of all adapters; None where there are none."""
        listed = [adapter.config.modules_to_save or () for adapter in self._adapters.values()]
        return set().union(*listed) or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter acts."""
        return bool(self.active_adapters) and not self._disabled

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """Dtype of the base's parameters."""
        floats = (p.dtype for p in self._base.parameters() if p.is_floating_point())
        return next(floats, None)

    @property
    def base_model(self) -> TunerView:
        """What PEFT calls so: this module's verbs, and the model as `.model`."""
        return TunerView(self)

    def get_base_model(self) -> nn.Module:
        """The model that was adapted, as it was: PEFT's would have its layers in it.

        Raises:
            UsageError: This module was not made from a model.
        """
        if self._origin.model is None:
            raise UsageError(
                "there is no model to give back", next_step="use fold(), which gives a GraphModule"
            )
        return self._origin.model

    def disable_adapter_layers(self) -> None:
        """Be the base model, in which no adapter trains, until `enable_adapter_layers`."""
        self._set_disabled(True)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters act again, and train where they did."""
        self._set_disabled(False)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Choose whether adapters train, active or not.

        Args:
            adapter_names: One name or several.
            requires_grad: Whether their parameters require gradients.

        Raises:
            UsageError: A name that is not there.
        """
        names = self._named(adapter_names)
        with self._change():
            for name in names:
                self._adapters[name].train(requires_grad)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Add an adapter whose change of each weight is a weighted sum of others' changes.

        Bone and mini are linear in their blocks, so blocks are summed. The other combinations of
        PEFT's LoRA are of two factors, which a block has not.

        Args:
            adapters: Names of adapters with one method and one block size.
            weights: One for each; they may be negative.
            adapter_name: Name of the new adapter; `set_adapter` makes it active.
            combination_type: `"linear"`.

        Raises:
            UsageError: Another combination, a BAT adapter, adapters that differ or train modules
                whole, or a name that is taken.
        """
        refuse_taken_name(self._adapters, adapter_name)
        parts = [self._adapter(name) for name in adapters]
        _refuse_unlike(adapters, weights, parts, combination_type)
        with torch.no_grad():
            blocks: dict[str, nn.Parameter] = {}
            for part, weight in zip(parts, weights, strict=True):
                for site, block in part.blocks.items():
                    term = block.detach() * weight
                    total = blocks[site] + term if site in blocks else term
                    blocks[site] = nn.Parameter(total, requires_grad=False)
        config = parts[0].config
        if any(part.blocks.keys() != blocks.keys() for part in parts):
            config = replace(
                config,
                target_modules=list(blocks),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
            )
        with self._change():
            self._adapters[adapter_name] = MountedAdapter(config, blocks, {})

    def enable_input_require_grads(self) -> None:
        """Nothing to do: blocks get their gradients under a frozen base without it."""

    def disable_input_require_grads(self) -> None:
        """Nothing to do, as nothing was enabled."""

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module | None = None) -> None:
        """Nothing to do: `gradient_checkpointing_enable` needs no inputs that require gradients."""


def _refuse_unlike(
    names: Sequence[str],
    weights: Sequence[float],
    parts: Sequence[MountedAdapter],
    combination_type: str,
) -> None:
    if combination_type != "linear":
        raise UsageError(
            f"combination_type={combination_type!r} needs two factors, and a block is one matrix",
            expected="'linear'",
        )
    if not names or len(names) != len(weights):
        raise UsageError(f"{len(names)} adapters and {len(weights)} weights", expected="one each")
    kinds = {(p.config.method, p.config.peft_type, p.config.r, p.config.mini_r) for p in parts}
    method = parts[0].config.method
    if len(kinds) > 1 or not METHODS[method].additive:
        raise UsageError(
            "only adapters of one kind that are linear in their blocks can be summed",
            expected="Bone or mini, with one r and one mini_r",
            found=", ".join(
                f"{name}: {part.config.method}, r={part.config.r}"
                for name, part in zip(names, parts, strict=True)
            ),
            next_step="train on top of each other with set_adapter([...], train=...), or fold one",
        )
    whole = [name for name, part in zip(names, parts, strict=True) if part.saved]
    if whole:
        raise UsageError(
            f"{', '.join(whole)} trained modules whole, which have no sum",
            next_step="combine adapters without modules_to_save",
        )
