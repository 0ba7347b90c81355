"""A trained adapter as it was read from a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bone_fx.adapters import METHODS, Block, LowRank
from bone_fx.config import BoneConfig
from bone_fx.errors import AdapterError, some
from bone_fx.lora.config import PEFT_TYPE as LORA
from bone_fx.lora.config import LoraConfig
from bone_fx.lora.contents import Rows
from bone_fx.sites import LinearSite, Refusal, check_fit, select_sites

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts in front of every name."""
LEAF_OF_TYPE = {"BONE": "bone_block", "MISS": "miss_block", LORA: "lora_A.weight"}
"""What a block's name ends in, by `peft_type`."""


@dataclass(frozen=True)
class AdapterFolder:
    """A trained adapter as it was read.

    Attributes:
        path: The folder.
        config: Its configuration.
        blocks: Block by site name, float32 as PEFT loads it (`autocast_adapter_dtype`).
        modules_to_save: Tensor by parameter name of every parameter that the file brings besides.
        in_base: Those of them that PEFT writes into the base itself, whatever else is tied to it.
        unused: Keys of tensors that mean nothing for this kind of adapter.
        given_up: Names and keys of tensors that the person gave up.
        biases: What a LoRA adds to a layer's bias, by site name.
        rows: Rows of embeddings that replace the base's, by name of the layer.
        stacked: Blocks of `target_parameters`, by PEFT's name of the module around them, until
            `deploy.trained.sites` finds the parameters.
    """

    path: Path
    config: BoneConfig | LoraConfig
    blocks: Mapping[str, Block]
    modules_to_save: dict[str, Tensor]
    in_base: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    stacked: Mapping[str, LowRank] = field(default_factory=dict)

    def match(
        self,
        sites: Iterable[LinearSite],
        others: Iterable[Refusal] = (),
        output_layers: Iterable[str] = (),
        parameters: Sequence[LinearSite] = (),
    ) -> list[LinearSite]:
        """The sites of a model that this adapter adapts, each with a block that fits.

        Args:
            sites: The layers of the model.
            others: What is no such layer, with the reason.
            output_layers: Names that `"all-linear"` leaves out.
            parameters: Sites of `target_parameters`, which are adapted besides.

        Raises:
            SiteError: The configuration matches nothing, or a method cannot fit a layer.
            AdapterError: Blocks and matched layers differ, or a shape does; the message lists both
                sides.
        """
        chosen = list(parameters)
        if not parameters or self.config.target_modules:
            chosen += select_sites(self.config, sites, others, set(output_layers))[0]
        if isinstance(self.config, BoneConfig):
            for site in chosen:
                check_fit(self.config, site)
        names = {site.name for site in chosen}
        missing = [site.name for site in chosen if site.name not in self.blocks]
        foreign = [name for name in self.blocks if name not in names]
        if missing or foreign:
            raise AdapterError(
                f"{self.path / WEIGHTS_NAME} does not fit this model: "
                f"{len(missing)} of {len(chosen)} layers are missing a block, "
                f"{len(foreign)} blocks have no layer",
                expected=f"a block for {some(missing)}" if missing else f"{len(chosen)} blocks",
                found=f"blocks for {some(foreign)}" if foreign else f"{len(self.blocks)} blocks",
                next_step="check that the adapter is this base's and that its file is whole",
            )
        for site in chosen:
            self._check_shape(site)
        return chosen

    def _check_shape(self, site: LinearSite) -> None:
        reason = self.misfit(site)
        if reason is not None:
            raise AdapterError(
                f"{self.path / WEIGHTS_NAME}: the block of {site.name} has the wrong shape",
                expected=f"one for a layer {site.in_features} -> {site.out_features}",
                found=reason,
                next_step="check that the adapter was trained on a base model of this width",
            )

    def misfit(self, site: LinearSite) -> str | None:
        """Why the block of a site does not fit its layer; None if it does."""
        block, config = self.blocks[site.name], self.config
        if isinstance(block, LowRank):
            return block.misfit(site.in_features, site.out_features, site.experts)
        sizes = (site.in_features, site.out_features)
        return METHODS[config.method].misfit(block, sizes, config.r, config.mini_r)


@dataclass(frozen=True)
class TrainedFolder(AdapterFolder):
    """An adapter of a kind that this package trains: Bone, BAT or MiSS."""

    config: BoneConfig
    blocks: dict[str, Tensor]
