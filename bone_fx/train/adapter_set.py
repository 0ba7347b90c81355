"""The adapters of a traced model, and the graph that is written for those that are active.

A pristine graph of the base is kept. The module's own graph is written anew from it, through
`insert_adapters` and `fold_adapters`, whenever the set of active adapters changes. Parameters are
kept: optimizers stay valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from bone_fx.adapter_folder import TrainedFolder
from bone_fx.config import BoneConfig
from bone_fx.dialects import find_sites
from bone_fx.errors import UsageError
from bone_fx.graphs import adopt_state, container, copy_module
from bone_fx.passes import fold_adapters
from bone_fx.passes.verifier import TRAINING, verify
from bone_fx.sites import LinearSite
from bone_fx.train.mounting import (
    MountedAdapter,
    adapter_named,
    carry_buffers,
    clone_parameters,
    insert_mounted,
    mount_parameters,
    named_buffers,
    narrow_blocks,
    new_adapter,
)
from bone_fx.train.origin import Origin
from bone_fx.train.training_graph import TrainingGraph, refuse_hidden_names, sign_as

_FORMS = 3
"""Graphs of other sets of active adapters that are kept, as a preference loss needs one or two."""


class AdapterSet(TrainingGraph):
    """A traced model with adapters by name, some of them active.

    Attributes:
        active_adapters: Names of the adapters in the graph, in the order in which they apply.
    """

    active_adapters: list[str]
    _base: fx.GraphModule
    _captures: list[tuple[Origin, fx.GraphModule]]  # for calls with other inputs
    _adapters: dict[str, MountedAdapter]
    _trained_when_on: list[tuple[nn.Parameter, bool]]

    def __init__(self, origin: Origin) -> None:
        refuse_hidden_names(_class_of(self), origin.graph_module)
        base = copy_module(origin.graph_module)
        if origin.freeze_base:
            for parameter in base.parameters():
                parameter.requires_grad_(False)
        sign_as(self, origin.model)
        super().__init__(copy_module(base), base.graph, "AdaptedModule")
        self.__dict__.update(
            _origin=origin, _base=base, _adapters={}, _trained_when_on=[], _forms={}, _captures=[]
        )
        self.active_adapters = []
        self._disabled = False
        self._merged: list[str] = []

    def _start(self, name: str, config: BoneConfig, folder: TrainedFolder | None = None) -> Self:
        """Be the graph under a first adapter, which trains unless its configuration says no."""
        adapter = new_adapter(self._base, self._origin, name, config, folder)
        adapter.train(not config.inference_mode)
        with self._change():
            self._adapters[name] = adapter
            self.active_adapters = [name]
        return self

    def _mount(self, name: str, config: BoneConfig, folder: TrainedFolder | None = None) -> None:
        adapter = new_adapter(self._base, self._origin, name, config, folder)
        with self._change():
            self._adapters[name] = adapter

    def _narrow(self, name: str) -> None:
        """Keep an adapter in the dtype of its layers, as PEFT's `autocast_adapter_dtype=False`."""
        with self._change():
            narrow_blocks(self._base, find_sites(self._base).sites, self._adapter(name))

    def _activate(self, names: list[str], trained: Sequence[str]) -> None:
        """Make adapters active, in this order; some of them train, and no other adapter does."""
        with self._other_form():
            self.active_adapters, self._merged = names, []
            self._trained_when_on = []
            for name, adapter in self._adapters.items():
                adapter.train(name in trained)
            if self._disabled:
                self._freeze_adapters()

    def _set_disabled(self, disabled: bool) -> None:
        """Show the base alone, in which no adapter trains, or the adapters again as they were."""
        if disabled == self._disabled:
            return
        for parameter, trained in self._trained_when_on:
            parameter.requires_grad_(trained)
        self._trained_when_on = []
        with self._other_form():
            self._disabled = disabled
        if disabled:
            self._freeze_adapters()

    @contextmanager
    def _other_form(self) -> Iterator[None]:
        """A change that may be taken back: the graph of before is kept, and a known one taken."""
        leaving = self._what_is_on()

        def take() -> None:
            entering = self._what_is_on()
            if self._swap_forms(leaving, entering):
                return
            forms = {k: form for k, form in self._forms.items() if k != entering}
            if leaving != entering:
                forms[leaving] = self._form()
            self._rebuild()
            self._forms = dict(list(forms.items())[-_FORMS:])

        with self._change(take):
            yield

    def _fit_call(self, *args: Any, **kwargs: Any) -> None:
        """Be a graph that takes the inputs of a call, where nobody chose those of this one.

        Trainers bring `token_type_ids`, or `position_ids` of packed sequences. The model is
        captured once for each such set of inputs; parameters, adapters and modes stay.

        Raises:
            CaptureError: The model cannot be captured with these inputs.
        """
        origin = self._origin
        if not origin.made_up or torch.compiler.is_compiling() or self.is_sharded:
            return
        given = origin.signature.tensors_of(*args, **kwargs)
        known = origin.signature.positional  # what else is given, the call refuses
        tensors = {name: tensor for name, tensor in given.items() if name in known}
        is_packed = origin.packs(tensors, kwargs.get("use_cache"))
        if origin.signature.takes(tensors, is_packed=is_packed):
            return
        fitting = [p for p in self._captures if p[0].signature.takes(tensors, is_packed=is_packed)]
        if fitting:
            entering = fitting[0]
        else:
            entering = self._captured(origin.for_call(tensors, is_packed=is_packed))
        with self._other_form():
            left = [pair for pair in self._captures if pair is not entering]
            self._use_capture(entering, [*left, (self._origin, self._base)])

    def _use_capture(
        self, used: tuple[Origin, fx.GraphModule], others: list[tuple[Origin, fx.GraphModule]]
    ) -> None:
        # As an attribute the base would become a module of this one.
        self.__dict__.update(_origin=used[0], _base=used[1], _captures=others)

    def _captured(self, origin: Origin) -> tuple[Origin, fx.GraphModule]:
        """A capture, and the base's graph of it over the parameters of this one."""
        base = copy_module(origin.graph_module)
        for name, parameter in self._base.named_parameters(remove_duplicate=False):
            owner, leaf = container(base, name)
            owner.register_parameter(leaf, parameter)
        return origin, base

    def _what_is_on(self) -> Hashable:
        """What a graph is written for: inputs, adapters, and the parameters that train."""
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        inputs = self._origin.signature.input_names
        return (
            inputs,
            self._disabled,
            tuple(self.active_adapters),
            tuple(self._merged),
            tuple(trained),
        )

    def _freeze_adapters(self) -> None:
        parameters = [p for adapter in self._adapters.values() for p in adapter.parameters()]
        self._trained_when_on = [(p, p.requires_grad) for p in parameters]
        for parameter in parameters:
            parameter.requires_grad_(False)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters, those of inactive adapters among them."""
        if self.is_sharded:
            return super().get_nb_trainable_parameters()
        unique = {id(parameter): parameter for parameter in self._base.parameters()}
        for adapter in self._adapters.values():
            unique |= {id(parameter): parameter for parameter in adapter.parameters()}
        counted = unique.values()
        return sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied: Self = _class_of(self)(copy.copy(self._origin))
        clone_parameters(self._base, copied._base)
        carry_buffers({n: b.clone() for n, b in named_buffers(self).items()}, copied)
        copied._adapters.update(copy.deepcopy(self._adapters, memo))
        copied.active_adapters = list(self.active_adapters)
        copied._merged, copied._disabled = list(self._merged), self._disabled
        copied._trained_when_on = [(memo[id(p)], on) for p, on in self._trained_when_on]
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
        """Parameters that adapters bring whole; of two that bring one, the later acts."""
        merged: dict[str, nn.Parameter] = {}
        for name in names:
            merged.update(self._adapter(name).saved)
        return merged

    def _refuse_two_heads(self, names: Sequence[str]) -> None:
        """Of two modules that were trained whole, one alone can act."""
        trained_by: dict[str, str] = {}
        for name in names:
            for parameter in sorted(self._adapter(name).trained_names()):
                if other := trained_by.get(parameter):
                    raise UsageError(
                        f"adapters {other!r} and {name!r} both trained {parameter} whole",
                        expected="one active adapter with a module in modules_to_save",
                        next_step=f"activate {other!r} or {name!r}",
                    )
                trained_by[parameter] = name

    def _touched(self, names: Sequence[str]) -> list[LinearSite]:
        sites = {name for adapter in names for name in self._adapter(adapter).blocks}
        return [site for site in find_sites(self._base).sites if site.name in sites]

    @contextmanager
    def _change(self, rewrite: Callable[[], None] | None = None) -> Iterator[None]:
        """A change of adapters: the graph is written anew, or everything is as it was before."""
        if self.is_sharded:
            raise UsageError("a sharded module keeps its adapters", next_step="shard it last")
        before = dict(self._adapters), self.active_adapters, self._merged, self._disabled
        captures = (self._origin, self._base), self._captures
        asleep = self._trained_when_on
        trains = [(p, p.requires_grad) for a in self._adapters.values() for p in a.parameters()]
        try:
            yield
            (rewrite or self._rebuild)()
        except BaseException:
            self.__dict__["_adapters"] = before[0]
            self.active_adapters, self._merged, self._disabled = before[1:]
            self._use_capture(*captures)
            self._trained_when_on = asleep
            for parameter, trained in trains:
                parameter.requires_grad_(trained)
            raise

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
        self._forms = {}
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


def _class_of(module: AdapterSet) -> Any:
    """The class as it was written: fx and FSDP2 give an instance a class of its own."""
    return next(kind for kind in type(module).__mro__ if kind.__module__.startswith("bone_fx."))
