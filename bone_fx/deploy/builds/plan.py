"""Which class a checkpoint and its adapters make, and where the adapters sit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from bone_fx.adapter_folder import AdapterFolder
from bone_fx.errors import AdapterError
from bone_fx.sites import LinearSite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bone_fx.base.loading import BaseCheckpoint

Adapters = Sequence[tuple[str, AdapterFolder]]


@dataclass(frozen=True)
class Plan:
    """Which class a checkpoint and its adapters make, and where the adapters sit.

    Attributes:
        architecture: The model's class.
        overrides: Fields of the configuration that the adapter's head decides.
        heads: Parameters that come from the adapters.
        adapters: The adapters in order.
        sites: The adapted sites by name.
    """

    architecture: type[PreTrainedModel]
    overrides: dict[str, Any]
    heads: dict[str, Tensor]
    adapters: Adapters
    sites: dict[str, LinearSite]


def heads_and_class(
    checkpoint: BaseCheckpoint, adapters: Adapters
) -> tuple[type[PreTrainedModel], dict[str, Any], dict[str, Tensor]]:
    """The model class that the adapters' task asks for, and the head that they bring."""
    from bone_fx.base.loading import architecture_for_task

    heads: dict[str, Tensor] = {}
    tasks = {adapter.config.task_type for _, adapter in adapters if adapter.config.task_type}
    for _, adapter in adapters:
        heads.update(adapter.modules_to_save)
    if len(tasks) > 1:
        raise AdapterError(
            f"the adapters were trained for different tasks: {', '.join(sorted(tasks))}",
            expected="one task",
            next_step="export them one by one",
        )
    task = next(iter(tasks), None)
    names = checkpoint.config.architectures
    generates = (
        task == "CAUSAL_LM"
        and bool(names)
        and checkpoint.architecture.__name__.endswith(("CausalLM", "LMHeadModel"))
    )
    architecture = (
        checkpoint.architecture
        if task is None or generates
        else architecture_for_task(checkpoint, task)
    )
    overrides: dict[str, Any] = {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        head = next(
            (
                t
                for name, t in heads.items()
                if name.endswith(("classifier.weight", "score.weight", "out_proj.weight"))
            ),
            None,
        )
        if head is not None and head.shape[0] != checkpoint.config.num_labels:
            overrides["num_labels"] = int(head.shape[0])
    return architecture, overrides, heads


def adapted_sites(model: nn.Module, adapters: Adapters) -> dict[str, LinearSite]:
    """The layers of a model that the adapters train, by name."""
    from bone_fx.dialects import find_module_sites
    from bone_fx.sites import output_layers

    sites, others = find_module_sites(model)
    chosen: dict[str, LinearSite] = {}
    for _, adapter in adapters:
        left_out = output_layers(model, adapter.config.task_type)
        chosen |= {site.name: site for site in adapter.match(sites, others, left_out)}
    return chosen
