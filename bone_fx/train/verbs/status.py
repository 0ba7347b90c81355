"""What an adapted module says about its adapters, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from bone_fx.train.adapter_set import AdapterSet
from bone_fx.train.mounting import MountedAdapter

Trains = bool | Literal["irregular"]
"""Whether parameters require gradients; `"irregular"` where some do."""

_LAYER_TYPES = {"BONE": "bone.BoneLinear", "MISS": "miss.MissLinear"}
_MODEL_TYPES = {"BONE": "BoneModel", "MISS": "MissModel"}


@dataclass(frozen=True)
class LayerStatus:
    """State of one adapted layer, with the fields of PEFT's `TunerLayerStatus`.

    Attributes:
        name: `model.` and the layer's name in the model, as PEFT has it.
        module_type: PEFT's class of the layer.
        enabled: Whether adapters act.
        active_adapters: Names of the active adapters of the module.
        merged_adapters: Names of the merged adapters that this layer has.
        requires_grad: Whether each adapter's parameters here train.
        available_adapters: Names of the adapters that this layer has.
        devices: Where each adapter's parameters here are.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Trains]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass(frozen=True)
class ModelStatus:
    """State of an adapted module, with the fields of PEFT's `TunerModelStatus`.

    Attributes:
        base_model_type: Class of the model.
        adapter_model_type: PEFT's class of the tuner.
        peft_types: Type of each adapter.
        trainable_params: Number of trainable parameters.
        total_params: Number of parameters.
        num_adapter_layers: Number of layers in `get_layer_status()`.
        enabled: Whether adapters act.
        active_adapters: Names of the active adapters.
        merged_adapters: Names of the merged adapters.
        requires_grad: Whether each adapter's parameters train.
        available_adapters: Names of all adapters.
        devices: Where each adapter's parameters are.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, Trains]
    available_adapters: list[str]
    devices: dict[str, list[str]]


class Status(AdapterSet):
    """An adapter set that says how it stands."""

    def get_layer_status(self) -> list[LayerStatus]:
        """State of every adapted layer, and of every module that an adapter trains whole."""
        layers = [
            self._layer(site.name, {n: [a.blocks[site.name]] for n, a in self._having(site.name)})
            for site in self._touched(list(self._adapters))
        ]
        modules: dict[str, dict[str, list[nn.Parameter]]] = {}
        for name, adapter in self._adapters.items():
            for parameter in sorted(adapter.trained_names()):
                owner = modules.setdefault(parameter.rpartition(".")[0], {})
                owner.setdefault(name, []).append(adapter.saved[parameter])
        layers += [self._layer(path, owned, whole=True) for path, owned in modules.items()]
        places = {f"model.{name}": place for place, name in enumerate(self._module_names())}
        return sorted(layers, key=lambda layer: places.get(layer.name, len(places)))

    def get_model_status(self) -> ModelStatus:
        """State of the whole module."""
        trainable, total = self.get_nb_trainable_parameters()
        types = {name: str(adapter.config.peft_type) for name, adapter in self._adapters.items()}
        kinds = {_MODEL_TYPES[kind] for kind in types.values()}
        owned = {name: adapter.parameters() for name, adapter in self._adapters.items()}
        return ModelStatus(
            base_model_type=type(self._origin.model).__name__,
            adapter_model_type="/".join(sorted(kinds)) or "None",
            peft_types=types,
            trainable_params=trainable,
            total_params=total,
            num_adapter_layers=len(self.get_layer_status()),
            enabled=not self._disabled,
            active_adapters=list(self.active_adapters),
            merged_adapters=list(self._merged),
            requires_grad={name: _trains(parameters) for name, parameters in owned.items()},
            available_adapters=sorted(self._adapters),
            devices={name: _devices(parameters) for name, parameters in owned.items()},
        )

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the layers that an adapter adapts, in the order of the model's modules."""
        adapted = {site.name for site in self._touched(list(self._adapters))}
        owned = [name for name in self._module_names() if name in adapted]
        return [*owned, *sorted(adapted.difference(owned))]

    def _module_names(self) -> list[str]:
        return [name for name, _ in self._base.named_modules(remove_duplicate=False)]

    def _having(self, site: str) -> list[tuple[str, MountedAdapter]]:
        return [(name, a) for name, a in self._adapters.items() if site in a.blocks]

    def _layer(
        self, name: str, owned: dict[str, list[nn.Parameter]], *, whole: bool = False
    ) -> LayerStatus:
        kind = str(self._adapters[next(iter(owned))].config.peft_type)
        return LayerStatus(
            name=f"model.{name}",
            module_type="ModulesToSaveWrapper" if whole else _LAYER_TYPES[kind],
            enabled=not self._disabled,
            active_adapters=[n for n in self.active_adapters if n in owned or not whole],
            merged_adapters=[n for n in self._merged if n in owned],
            requires_grad={n: _trains(parameters) for n, parameters in owned.items()},
            available_adapters=sorted(owned),
            devices={n: _devices(parameters) for n, parameters in owned.items()},
        )


def _trains(parameters: Iterable[nn.Parameter]) -> Trains:
    flags = {parameter.requires_grad for parameter in parameters}
    return "irregular" if len(flags) > 1 else True in flags


def _devices(parameters: Iterable[nn.Parameter]) -> list[str]:
    return sorted({parameter.device.type for parameter in parameters})
