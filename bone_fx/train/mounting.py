"""What an adapted module keeps of each adapter: its parameters, and where they are mounted."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from bone_fx.adapter_folder import TrainedFolder
from bone_fx.adapters import METHODS
from bone_fx.config import BoneConfig
from bone_fx.dialects import find_sites
from bone_fx.errors import AdapterError, UsageError
from bone_fx.graphs import computed_tensors, container
from bone_fx.passes.fold import fold_weight
from bone_fx.passes.insert import BLOCK, insert_adapters
from bone_fx.sites import LinearSite, Refusal, is_trained_whole, modules_above
from bone_fx.train.origin import Origin
from bone_fx.train.targets import (
    not_adapted,
    refusals_of,
    refuse_lists,
    warn_if_nothing_is_excluded,
    warn_of,
    with_default_targets,
    with_heads,
)


@dataclass
class MountedAdapter:
    """An adapter on a module.

    Attributes:
        config: Its configuration.
        blocks: Its blocks by site.
        saved: Its own copies of parameters that it brings whole, by name.
        refused: Targets that could not be adapted.
        frozen: Names in `saved` of what PEFT writes into the base itself: it never trains.
    """

    config: BoneConfig
    blocks: dict[str, nn.Parameter]
    saved: dict[str, nn.Parameter]
    refused: tuple[Refusal, ...] = ()
    frozen: frozenset[str] = frozenset()

    def parameters(self) -> list[nn.Parameter]:
        """Its blocks, and its copies of parameters that it brings whole."""
        return [*self.blocks.values(), *self.saved.values()]

    def trained_names(self) -> set[str]:
        """Names of the parameters in `modules_to_save`."""
        return set(self.saved) - self.frozen

    def train(self, trains: bool) -> None:
        """Choose whether its parameters require gradients."""
        for block in self.blocks.values():
            block.requires_grad_(trains)
        for name, parameter in self.saved.items():
            parameter.requires_grad_(trains and name not in self.frozen)


def adapter_named(adapters: Mapping[str, MountedAdapter], name: str) -> MountedAdapter:
    """The adapter of a name.

    Raises:
        UsageError: There is none.
    """
    if name not in adapters:
        raise UsageError(
            f"there is no adapter {name!r}",
            expected=f"one of {list(adapters)}",
            next_step="correct the name, or add_adapter(name, config) first",
        )
    return adapters[name]


def refuse_taken_name(adapters: Mapping[str, MountedAdapter], name: str) -> None:
    """Refuse a name for a new adapter that another one has.

    Raises:
        UsageError: It is taken.
    """
    if name in adapters:
        raise UsageError(
            f"there is already an adapter {name!r}",
            next_step="delete_adapter it, or use another name",
        )


def saved_parameters(
    base: nn.Module, config: BoneConfig, trained_values: Mapping[str, Tensor], where: str
) -> tuple[dict[str, nn.Parameter], list[Refusal]]:
    """An adapter's own copies of the parameters that it trains whole.

    Args:
        base: The base model's graph.
        config: The adapter's configuration, for `modules_to_save`.
        trained_values: By parameter name, from an adapter folder; empty for a fresh adapter.
        where: The folder or adapter, for messages.

    Returns:
        The parameters by name, and the modules that the base does not have (PEFT adds both
        `classifier` and `score` for a classification task).

    Raises:
        AdapterError: A trained value belongs to no parameter, or has another shape; a module has
            statistics, which an adapter folder does not hold.
    """
    statistics = [name for name, _ in base.named_buffers() if is_trained_whole(config, name)]
    if any(name.endswith("running_mean") for name in statistics):
        raise AdapterError(
            f"{where}: modules_to_save would lose the statistics {', '.join(statistics[:3])}",
            expected="modules whose state is parameters",
            next_step="leave the batch norm out of modules_to_save",
        )
    trained = {
        name: nn.Parameter(parameter.detach().clone())
        for name, parameter in base.named_parameters(remove_duplicate=False)
        if is_trained_whole(config, name)
    }
    by_name = dict(base.named_parameters(remove_duplicate=False))
    for name, tensor in trained_values.items():
        if name not in by_name:
            raise AdapterError(
                f"{where}: the model has no parameter {name!r}", next_step="check the base model"
            )
        parameter = by_name[name]
        if parameter.shape != tensor.shape:
            raise AdapterError(
                f"{where}: the saved {name} does not fit",
                expected=list(parameter.shape),
                found=list(tensor.shape),
                next_step="load it into the model that the adapter was trained on",
            )
        trained[name] = nn.Parameter(tensor.to(parameter.device, parameter.dtype).clone())
    reason = "modules_to_save names a module that this model does not have"
    absent = [
        Refusal(module, reason)
        for module in config.modules_to_save or ()
        if not any(path.endswith(module) for name in trained for path in modules_above(name))
    ]
    return trained, absent


def insert_mounted(
    base: fx.GraphModule, origin: Origin, adapters: Sequence[tuple[str, MountedAdapter]]
) -> fx.GraphModule:
    """The base's graph with adapters inserted, in order, over the blocks that they have."""
    for name, adapter in adapters:
        base = insert_adapters(
            base,
            adapter.config,
            name,
            blocks=adapter.blocks,
            output_layers=origin.output_layers(adapter.config),
            freeze_base=False,
            untie=origin.untie,
            recompute=origin.recompute,
        ).graph_module
    return base


def mount_parameters(
    root: nn.Module, sites: Sequence[LinearSite], adapters: Mapping[str, MountedAdapter]
) -> None:
    """Put every adapter's blocks under their names, and say the sizes of the layers they are on."""
    for name, adapter in adapters.items():
        for site in sites:
            if site.name in adapter.blocks:
                owner, leaf = container(root, f"{site.block_owner}.{BLOCK}.{name}")
                owner.register_parameter(leaf, adapter.blocks[site.name])
                layer: Any = root.get_submodule(site.block_owner)
                layer.in_features, layer.out_features = site.in_features, site.out_features


def narrow_blocks(base: nn.Module, sites: Sequence[LinearSite], adapter: MountedAdapter) -> None:
    """Give an adapter's blocks the dtype of the weights that they change."""
    for site in sites:
        block = adapter.blocks.get(site.name)
        if block is not None:
            block.data = block.data.to(base.get_parameter(site.weight_name).dtype)


def mounted_values(
    root: nn.Module, sites: Sequence[LinearSite], name: str, adapter: MountedAdapter
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An adapter's blocks by site and its saved parameters by name, gathered where sharded."""
    blocks = {
        site.name: _whole(root.get_parameter(f"{site.block_owner}.{BLOCK}.{name}"))
        for site in sites
    }
    current = dict(root.named_parameters(remove_duplicate=False))
    sharded = any(hasattr(parameter, "full_tensor") for parameter in current.values())
    saved = {n: _whole(current[n] if sharded else p) for n, p in adapter.saved.items()}
    return blocks, saved


def copy_values(
    root: nn.Module,
    sites: Sequence[LinearSite],
    name: str,
    adapter: MountedAdapter,
    folder: TrainedFolder,
) -> None:
    """Write a folder's values into an adapter's parameters.

    Raises:
        AdapterError: The folder has other blocks or other shapes.
    """
    current = dict(root.named_parameters(remove_duplicate=False))
    places = {site.name: current[f"{site.block_owner}.{BLOCK}.{name}"] for site in sites}
    sharded = any(hasattr(parameter, "full_tensor") for parameter in current.values())
    saved = {n: current[n] if sharded else p for n, p in adapter.saved.items()}
    for kind, targets, trained_values in (
        ("blocks", places, folder.blocks),
        ("modules_to_save", saved, folder.modules_to_save),
    ):
        shapes = [
            {n: tuple(p.shape) for n, p in side.items()} for side in (targets, trained_values)
        ]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"{folder.path}: its {kind} are not those of adapter {name!r}",
                expected=f"{len(targets)}, as in this module",
                found=f"{len(trained_values)}, or other shapes",
                next_step="load it under another name",
            )
    with torch.no_grad():
        for targets, trained_values in ((places, folder.blocks), (saved, folder.modules_to_save)):
            for key, parameter in targets.items():
                parameter.copy_(_laid_out_like(parameter, trained_values[key]))


def _laid_out_like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    placements: Any = getattr(parameter, "placements", None)
    return distribute_tensor(value.to(parameter.device, parameter.dtype), mesh, placements)


def has_processes() -> bool:
    """Whether there is a process group, without which nothing is sharded."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def is_first_process() -> bool:
    """Whether this process is the first of its group, or alone."""
    return not has_processes() or torch.distributed.get_rank() == 0


def _whole(parameter: nn.Parameter) -> Tensor:
    gather = getattr(parameter, "full_tensor", None)  # a DTensor, under FSDP2
    return parameter.detach() if gather is None else gather().detach()


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers under all their names."""
    return dict(module.named_buffers(remove_duplicate=False))


def clone_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give a twin of a module copies of its parameters' values."""
    for name, parameter in source.named_parameters(remove_duplicate=False):
        twin = target.get_parameter(name)
        twin.data = parameter.data.clone()
        twin.requires_grad_(parameter.requires_grad)


def carry_buffers(buffers: Mapping[str, Tensor], module: nn.Module) -> None:
    """Carry buffers that moved or were written over to another form of their graph."""
    for name, buffer in buffers.items():
        owner, leaf = container(module, name)
        if leaf in owner._buffers:
            owner._buffers[leaf] = buffer


def new_adapter(
    base: fx.GraphModule,
    origin: Origin,
    name: str,
    config: BoneConfig,
    folder: TrainedFolder | None = None,
) -> MountedAdapter:
    """An adapter for a base: fresh blocks, or those of a folder.

    A classification task trains the model's head too, and a configuration without targets takes
    those of the model's type, as in PEFT. What was asked for and cannot be done is a warning.

    Raises:
        SiteError: Nothing matched, or a block cannot fit its layer.
        AdapterError: The folder, or a trained module of it, does not fit.
    """
    model = origin.model
    config = with_default_targets(config, model)
    refuse_lists(config, model)
    if folder is not None:
        search = find_sites(base)
        folder = replace(folder, config=config)
        folder.match(search.sites, search.others, origin.output_layers(config))
    else:
        names = [name for name, _ in base.named_parameters(remove_duplicate=False)]
        config = with_heads(config, names)
    result = insert_adapters(
        base,
        config,
        name,
        blocks=folder.blocks if folder else None,
        output_layers=origin.output_layers(config),
        untie=origin.untie,
    )
    blocks = {
        site.name: result.graph_module.get_parameter(f"{site.block_owner}.{BLOCK}.{name}")
        for site in result.applied
    }
    trained_values = folder.modules_to_save if folder else {}
    where = str(folder.path) if folder else name
    saved, absent = saved_parameters(base, config, trained_values, where)
    missed = not_adapted(config, model, result.applied, origin.output_layers(config))
    refused = refusals_of(config, model, [*result.refused, *absent], missed)
    warn_of(refused)
    modules = (base if model is None else model).named_modules()
    warn_if_nothing_is_excluded(config, (module for module, _ in modules))
    frozen = folder.in_base if folder else frozenset()
    adapter = MountedAdapter(config, blocks, saved, tuple(refused), frozen)
    adapter.train(False)  # until it is active
    return adapter


def delta_weight(
    base: fx.GraphModule, site: str, adapter: MountedAdapter, before: Sequence[MountedAdapter]
) -> Tensor:
    """What an adapter adds to a weight after those before it, in the weight's own layout."""
    place = next(s for s in find_sites(base).sites if s.name == site)
    steps = [(a.config.method, a.blocks[site].detach()) for a in before if site in a.blocks]
    with torch.no_grad():
        weight = base.get_parameter(place.weight_name).detach().float()
        received = fold_weight(weight, steps, transposed=place.transposed, layer=site)
        w_OI = received.t() if place.transposed else received
        delta = METHODS[adapter.config.method].delta(w_OI, adapter.blocks[site].detach().float())
    return delta.t().contiguous() if place.transposed else delta


def with_parameters(model: nn.Module, source: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy of a model with some parameters taken from another; the rest shares its memory.

    What the other has elsewhere is taken from it too: it was moved, cast, or is of a copy. What
    trains is what trains in the other: the parameters of the model itself keep their flags.
    """
    shared: dict[int, Any] = computed_tensors(model)
    here = dict(source.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        trains = here[name].requires_grad if name in here else parameter.requires_grad
        twin = nn.Parameter(parameter.detach(), requires_grad=trains)
        shared.setdefault(id(parameter), twin)
    copied = copy.deepcopy(model, shared)
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    config: Any = getattr(copied, "config", None)
    if config is not None and any(owners[id(model.get_parameter(name))] > 1 for name in names):
        config.tie_word_embeddings = False  # a layer that was untied has a weight of its own
    moved: dict[int, Any] = {}
    statistics = named_buffers(source)
    for name, buffer in named_buffers(copied).items():
        if name not in statistics:
            continue
        there = moved.setdefault(id(buffer), torch.empty_like(statistics[name]))
        there.copy_(statistics[name])
        owner, leaf = container(copied, name)
        owner._buffers[leaf] = there
    for name, parameter in copied.named_parameters(remove_duplicate=False):
        if name not in names and name in here and not _is_same_memory(parameter, here[name]):
            twin = nn.Parameter(here[name].detach(), requires_grad=parameter.requires_grad)
            owner, leaf = container(copied, name)
            owner.register_parameter(leaf, moved.setdefault(id(parameter), twin))
    for name in sorted(names):
        owner, leaf = container(copied, name)
        trains = here[name].requires_grad
        owner.register_parameter(leaf, nn.Parameter(here[name].detach(), requires_grad=trains))
    return copied


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return (one.device, one.dtype, one.data_ptr()) == (other.device, other.dtype, other.data_ptr())
