"""The weights of a model that adapters act on: layers; for a LoRA embeddings and parameters too.

PEFT wraps a module once for each of its parameters in `target_parameters`, in the order in which
the module has them: in a file `experts.base_layer.lora_A` is of the first, `experts.lora_A` of the
last. Of stacked weights `[E, X, Y]` PEFT up to 0.18 takes X for the inputs, from 0.20 on Y, unless
the module says that it is transposed. Shapes tell, but where X is Y.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from bone_fx.adapter_folder import WEIGHTS_NAME, AdapterFolder, Adapters
from bone_fx.adapters import LowRank
from bone_fx.errors import AdapterError, some
from bone_fx.lora.config import LoraConfig
from bone_fx.sites import LinearSite

_BASE_LAYER = ".base_layer"
_TABLE = "Embedding"
_FIRST_TURNED, _ALL_TURNED = (0, 19), (0, 20)


def adapted_sites(model: nn.Module, adapters: Adapters) -> dict[str, LinearSite]:
    """The weights of a model that the adapters train, by name.

    Raises:
        SiteError: A configuration matches nothing.
        AdapterError: An adapter does not fit the model, or two name one weight in two ways.
    """
    from bone_fx.dialects import find_module_sites
    from bone_fx.sites import output_layers

    linears, others = find_module_sites(model)
    chosen: dict[str, LinearSite] = {}
    for _, adapter in adapters:
        left_out = output_layers(model, adapter.config.task_type)
        layers, parameters = linears, list[LinearSite]()
        if isinstance(adapter.config, LoraConfig):
            layers = [*linears, *_embeddings(model)]
            targets = _target_parameters(adapter.config, model)
            parameters = [_parameter_site(name, tensor) for name, tensor in targets.items()]
        sites = adapter.match(layers, others, left_out, parameters)
        chosen |= {site.name: site for site in sites}
    by_weight = {site.weight_name: name for name, site in chosen.items()}
    twice = [name for name, site in chosen.items() if by_weight[site.weight_name] != name]
    if twice:
        raise AdapterError(
            f"{twice[0]} is adapted as a layer and as a parameter",
            expected="one of them in all adapters",
            next_step="fold one adapter into the base, and the other into the result",
        )
    return chosen


def with_parameters(adapter: AdapterFolder, model: nn.Module) -> AdapterFolder:
    """An adapter whose blocks of `target_parameters` have the names of these parameters.

    Args:
        adapter: The adapter.
        model: The base, with or without weights.

    Raises:
        AdapterError: Blocks and parameters do not fit.
    """
    config = adapter.config
    if not isinstance(config, LoraConfig) or not adapter.stacked:
        return adapter
    targets = _target_parameters(config, model)
    of_module: dict[str, list[str]] = {}
    for name in targets:
        of_module.setdefault(name.rpartition(".")[0], []).append(name)
    places = {
        module + _BASE_LAYER * (len(names) - 1 - place): name
        for module, names in of_module.items()
        for place, name in enumerate(names)
    }
    lost = [place for place in adapter.stacked if place not in places]
    lacking = [place for place in places if place not in adapter.stacked]
    if lost or lacking:
        raise AdapterError(
            f"{adapter.path / WEIGHTS_NAME}: its blocks are not those of target_parameters",
            expected=some(list(places)) or f"parameters such as {config.target_parameters}",
            found=some(list(adapter.stacked)),
            next_step="use the base model that the adapter was trained on",
        )
    blocks = {
        name: _block(adapter, config, model, name, targets[name], adapter.stacked[place])
        for place, name in places.items()
    }
    return replace(adapter, blocks={**adapter.blocks, **blocks}, stacked={})


def _embeddings(model: nn.Module) -> list[LinearSite]:
    """Tables of embeddings, each as the transposed weight of a layer that reads numbers."""
    return [
        LinearSite(name, f"{name}.weight", len(module.weight), module.weight.shape[1], True, _TABLE)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]


def _target_parameters(config: LoraConfig, model: nn.Module) -> Mapping[str, Tensor]:
    """The parameters that a configuration targets, by name, as PEFT chooses them."""
    ends = tuple(f".{target}" for target in config.target_parameters or ())
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ends and f".{name}".endswith(ends)
    }


def _parameter_site(name: str, parameter: Tensor) -> LinearSite:
    *stack, outputs, inputs = parameter.shape
    return LinearSite(name, name, inputs, outputs, experts=stack[0] if stack else 0)


def _block(
    adapter: AdapterFolder,
    config: LoraConfig,
    model: nn.Module,
    name: str,
    parameter: Tensor,
    pair: LowRank,
) -> LowRank:
    """A parameter's block, of A `[rE, in]` and B `[out, rE]` as PEFT keeps them."""
    rank, shape = config.rank(name), tuple(parameter.shape)
    experts = shape[0] if len(shape) == 3 else 1
    plain: tuple[int, ...] = (pair.b.shape[0], pair.a.shape[1])
    ways = {plain: False, plain[::-1]: True}
    whole = (pair.a.shape[0], pair.b.shape[1]) == (rank * experts, rank * experts)
    if len(shape) not in (2, 3) or not whole or shape[-2:] not in ways or config.use_dora:
        raise AdapterError(
            f"{adapter.path / WEIGHTS_NAME}: the block of {name} has the wrong shape",
            expected=f"A [{rank * experts}, in] and B [out, {rank * experts}] for {list(shape)}",
            found=f"{list(pair.a.shape)} and {list(pair.b.shape)}",
            next_step="use the base model that the adapter was trained on",
        )
    scale = config.scale(name)
    if len(shape) == 2:
        return LowRank(pair.a, pair.b, scale)
    a_ERI = pair.a.reshape(experts, rank, -1)
    b_EOR = pair.b.reshape(-1, rank, experts).permute(2, 0, 1)
    turned = ways[shape[-2:]] if plain != plain[::-1] else _reads_rows(adapter, config, model, name)
    if turned:
        return LowRank(b_EOR.mT.contiguous(), a_ERI.mT.contiguous(), scale)
    return LowRank(b=b_EOR.contiguous(), a=a_ERI, scale=scale)


def _reads_rows(adapter: AdapterFolder, config: LoraConfig, model: nn.Module, name: str) -> bool:
    """Whether the version of PEFT that wrote an adapter takes rows of square weights for inputs.

    Raises:
        AdapterError: The configuration does not say which version that is.
    """
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", config.peft_version or "")
    if numbers is None:
        raise AdapterError(
            f"{adapter.path}: the weights of {name} are square, and which of their sides are inputs"
            " hangs on the version of PEFT",
            expected="peft_version in adapter_config.json",
            next_step="write the version there that the adapter was trained with",
        )
    version = (int(numbers[1]), int(numbers[2]))
    transposed = bool(getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False))
    if version < _FIRST_TURNED:
        return True
    return transposed if version >= _ALL_TURNED else not transposed
