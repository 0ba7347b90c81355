"""`AdaptedModule`: a traced model under any number of block adapters, with PEFT's verbs.

It keeps a pristine graph of the base and writes its own graph anew from it, through
`insert_adapters` and `fold_adapters`, whenever the set of active adapters changes. Parameters are
kept: optimizers stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from bone_fx.adapter_folder import AdapterFolder, read_adapter, write_adapter
from bone_fx.config import BoneConfig
from bone_fx.dialects import find_sites
from bone_fx.errors import UsageError
from bone_fx.graphs import adopt_state, container, copy_module
from bone_fx.passes import fold_adapters
from bone_fx.passes.verifier import TRAINING, verify
from bone_fx.sites import LinearSite, Refusal
from bone_fx.train.folded import FoldedModule
from bone_fx.train.mounting import (
    MountedAdapter,
    Origin,
    adapter_named,
    carry_buffers,
    clone_parameters,
    copy_values,
    delta_weight,
    insert_mounted,
    is_first_process,
    mount_parameters,
    mounted_values,
    named_buffers,
    new_adapter,
    refuse_taken_name,
    with_parameters,
)
from bone_fx.train.training_graph import TrainingGraph, refuse_hidden_names, sign_as


class AdaptedModule(TrainingGraph):
    """A GraphModule with one block-adaptation node a site, called like its model.

    Attributes:
        config: The base model's own configuration, if it has one.
        active_adapters: Names of the adapters in the graph, in the order in which they apply.
        refused: Targets of the adapters that could not be adapted.

    Examples:
        >>> import bone_fx
        >>> net = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 7))
        >>> x = torch.randn(3, 48)
        >>> adapted = bone_fx.adapt(net, BoneConfig(r=16, target_modules=["0"]), [x])
        >>> with adapted.disable_adapter():
        ...     torch.equal(adapted(x), net(x))
        True
        >>> adapted.add_adapter("second", BoneConfig(r=8, target_modules=["2"]))
        >>> adapted.set_adapter(["default", "second"], train="second")
        >>> type(adapted.merge_and_unload()).__name__  # the model's class, folded weights
        'Sequential'
    """

    active_adapters: list[str]
    _base: fx.GraphModule
    _adapters: dict[str, MountedAdapter]

    def __init__(self, origin: Origin) -> None:
        refuse_hidden_names(AdaptedModule, origin.graph_module)
        base = copy_module(origin.graph_module)
        if origin.freeze_base:
            for parameter in base.parameters():
                parameter.requires_grad_(False)
        sign_as(self, origin.model)
        super().__init__(copy_module(base), base.graph, "AdaptedModule")
        self.__dict__.update(_origin=origin, _base=base, _adapters={})
        self.active_adapters = []
        self._disabled = False
        self._merged: list[str] = []
        self._rebuild()

    @property
    def peft_config(self) -> dict[str, BoneConfig]:
        """Configuration of every adapter, by name."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """What was asked for by the adapters and could not be done."""
        return tuple(refusal for adapter in self._adapters.values() for refusal in adapter.refused)

    # Adapters: add, load, choose, switch off, delete.

    def add_adapter(self, adapter_name: str, config: BoneConfig) -> None:
        """Add an adapter with fresh blocks; `set_adapter` makes it active.

        Raises:
            SiteError: Nothing matched, or a block cannot fit its layer.
            UsageError: The name is taken.
        """
        refuse_taken_name(self._adapters, adapter_name)
        self._mount(adapter_name, config)

    def load_adapter(self, directory: str | Path, adapter_name: str = "default") -> None:
        """Add a trained adapter from a folder in PEFT's layout; `set_adapter` makes it active.

        Raises:
            AdapterError: The folder is broken, or does not fit this model.
            SiteError: Its configuration matches nothing here.
            UsageError: The name is taken.
        """
        refuse_taken_name(self._adapters, adapter_name)
        folder = read_adapter(directory, adapter_name)
        self._mount(adapter_name, folder.config, folder)

    def _mount(self, name: str, config: BoneConfig, folder: AdapterFolder | None = None) -> None:
        adapter = new_adapter(self._base, self._origin, name, config, folder)
        with self._change():
            self._adapters[name] = adapter

    def set_adapter(
        self, adapter_names: str | Sequence[str], *, train: str | Sequence[str] | None = None
    ) -> None:
        """Make adapters active, in this order; their blocks train, those of the others are frozen.

        Args:
            adapter_names: The active adapters.
            train: Those of them that train; None for all.

        Raises:
            UsageError: A name that is not there or not active, or given twice.
        """
        names = self._named(adapter_names)
        trained = names if train is None else self._named(train)
        if not set(trained) <= set(names):
            raise UsageError("only an active adapter can train", expected=names, found=trained)
        if len(set(names)) != len(names):
            raise UsageError(f"an adapter is named twice: {names}")
        with self._change():
            self.active_adapters, self._merged = names, []
            for name, adapter in self._adapters.items():
                adapter.train(name in trained)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its blocks; the others stay as they are."""
        self._adapter(adapter_name)
        with self._change():
            del self._adapters[adapter_name]
            self.active_adapters = [n for n in self.active_adapters if n != adapter_name]
            self._merged = [n for n in self._merged if n != adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which this is the base model.

        The graph has no adapters, not a flag that skips them. Both are kept until adapters change.
        """
        before = self._disabled
        self._set_disabled(True)
        try:
            yield
        finally:
            self._set_disabled(before)

    # Weights: delta, merge, fold, unload.

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
        """
        names = self._named(adapters)
        carry_buffers(named_buffers(self), self._base)
        result = fold_adapters(self._inserted(names)).graph_module
        for name, parameter in self._saved(names).items():
            owner, leaf = container(result, name)
            owner.register_parameter(
                leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False)
            )
        return FoldedModule(result, self._origin.signature, training=self.training)

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Put folded weights in place of the active adapters.

        The base's own bytes are kept for `unmerge_adapter`.
        """
        names = self._named(adapter_names)
        with self._change():
            self._merged = names

    def unmerge_adapter(self) -> None:
        """Give the base its own weights back, bit for bit, and the adapters their nodes."""
        with self._change():
            self._merged = []

    def merge_and_unload(self, adapter_names: str | Sequence[str] | None = None) -> nn.Module:
        """The original model class with folded weights, ready for `generate` and `save_pretrained`.

        The model that was adapted is not changed; weights that no adapter touches are shared with
        it, or with this module where it is a copy, was moved or was cast.

        Raises:
            UsageError: This module was not made from a model.
        """
        model = self._origin.model
        if model is None:
            raise UsageError(
                "there is no model to give back", next_step="use fold(), which gives a GraphModule"
            )
        chosen = self._named(adapter_names)
        folded = self.fold(chosen)
        names = {site.weight_name for site in self._touched(chosen)} | set(self._saved(chosen))
        return with_parameters(model, folded, names).train(self.training)

    # What people ask of a PEFT model.

    def save_pretrained(
        self,
        save_directory: str | Path,
        selected_adapters: Sequence[str] | None = None,
        *,
        is_main_process: bool | None = None,
    ) -> None:
        """Write adapters in PEFT's layout: `default` at the root, others in folders of their names.

        Under FSDP2 every process must call it: blocks are gathered.

        Args:
            save_directory: Folder to write to.
            selected_adapters: Names; None for all.
            is_main_process: Whether this process writes; None for the first of them only.
        """
        if is_main_process is None:
            is_main_process = is_first_process()
        for name in self._adapters if selected_adapters is None else selected_adapters:
            adapter = self._adapter(name)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            config = copy.deepcopy(adapter.config)
            if config.base_model_name_or_path is None:
                config.base_model_name_or_path = getattr(self.config, "_name_or_path", None) or None
            config.inference_mode = True
            blocks, saved = mounted_values(self, self._touched([name]), name, adapter)
            if is_main_process:
                write_adapter(folder, config, blocks, saved)

    def restore(self, directory: str | Path) -> None:
        """Read every adapter's values again from what `save_pretrained` wrote, in place.

        Optimizers stay valid.

        Raises:
            AdapterError: A folder is missing, or of an adapter of another shape.
        """
        search = find_sites(self._base)
        for name, adapter in self._adapters.items():
            place = Path(directory) if name == "default" else Path(directory) / name
            folder = read_adapter(place, name)
            folder.match(search.sites, search.others, self._origin.output_layers(folder.config))
            copy_values(self, self._touched([name]), name, adapter, folder)

    # The call, and the graph underneath it.

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModule:
        copied = AdaptedModule(copy.copy(self._origin))
        clone_parameters(self._base, copied._base)
        carry_buffers({n: b.clone() for n, b in named_buffers(self).items()}, copied)
        copied._adapters.update(copy.deepcopy(self._adapters, memo))
        copied.active_adapters = list(self.active_adapters)
        copied._merged, copied._disabled = list(self._merged), self._disabled
        copied._every = self._every
        copied._split, copied._checkpointing = self._split, copy.copy(self._checkpointing)
        copied.training = self.training
        copied._rebuild()
        return copied

    def __reduce__(self) -> Any:
        raise UsageError(
            "an AdaptedModule cannot be pickled",
            next_step="keep adapters with save_pretrained(dir), parameters with state_dict()",
        )

    def _adapter(self, name: str) -> MountedAdapter:
        return adapter_named(self._adapters, name)

    def _named(self, names: str | Sequence[str] | None) -> list[str]:
        """Adapter names as a list, the active ones for None; each must be there."""
        names = self.active_adapters if names is None else names
        chosen = [names] if isinstance(names, str) else list(names)
        _ = [self._adapter(name) for name in chosen]  # refuses a name that is not there
        return chosen

    def _saved(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Parameters of `modules_to_save`; of two adapters that have one, the later acts."""
        merged: dict[str, nn.Parameter] = {}
        for name in names:
            merged.update(self._adapter(name).saved)
        return merged

    def _touched(self, names: Sequence[str]) -> list[LinearSite]:
        sites = {name for adapter in names for name in self._adapter(adapter).blocks}
        return [site for site in find_sites(self._base).sites if site.name in sites]

    @contextmanager
    def _change(self) -> Iterator[None]:
        """A change of adapters: the graph is written anew, or everything is as it was before."""
        if self.is_sharded:
            raise UsageError("a sharded module keeps its adapters", next_step="shard it last")
        before = dict(self._adapters), self.active_adapters, self._merged, self._disabled
        trains = [(p, p.requires_grad) for a in self._adapters.values() for p in a.parameters()]
        try:
            yield
            self._rebuild()
        except BaseException:
            self.__dict__["_adapters"] = before[0]
            self.active_adapters, self._merged, self._disabled = before[1:]
            for parameter, trained in trains:
                parameter.requires_grad_(trained)
            raise

    def _set_disabled(self, disabled: bool) -> None:
        """Show the base alone, or the adapters again."""
        if disabled != self._disabled and not self._swap_forms():
            leaving = self._form()
            with self._change():
                self._disabled = disabled
            self._other_form = leaving
        self._disabled = disabled

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast what is mounted, and what waits to be mounted again."""
        super()._apply(fn, recurse)
        mounted = {id(parameter) for parameter in self.parameters()}
        waiting = list(self._base.parameters())
        for adapter in self._adapters.values():
            waiting += adapter.parameters()
        with torch.no_grad():
            for parameter in {id(p): p for p in waiting if id(p) not in mounted}.values():
                parameter.data = fn(parameter.data)
        return self

    def _inserted(self, names: Sequence[str]) -> fx.GraphModule:
        return insert_mounted(self._base, self._origin, [(n, self._adapter(n)) for n in names])

    def _rebuild(self) -> None:
        """Write the graph anew for the active adapters and mount every kept parameter."""
        self._other_form = None
        carry_buffers(named_buffers(self), self._base)
        parameters = dict(self._base.named_parameters(remove_duplicate=False))
        gm = self._base
        if not self._disabled:
            names = self._merged or self.active_adapters
            gm = self._inserted(names)
            parameters |= self._saved(names)
        if self._merged and not self._disabled:
            gm = fold_adapters(gm).graph_module
            parameters |= {
                s.weight_name: gm.get_parameter(s.weight_name) for s in self._touched(self._merged)
            }
        root = copy_module(gm)
        mount_parameters(root, find_sites(self._base).sites, self._adapters)
        for name, parameter in parameters.items():
            owner, leaf = container(root, name)
            owner.register_parameter(leaf, parameter)
        verify(TRAINING, root.graph)
        self._split_if_asked(root)
        adopt_state(self, root)
        self.graph = root.graph
        self.train(self.training)
