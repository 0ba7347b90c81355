"""A LoRA's folder as PEFT lays it out, read for verification by a path of its own.

Written from PEFT's `save_and_load.py` and `tuners/lora/layer.py` (0.21.2), not from the exporter's
reader: what that one takes wrongly shows as a difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bone_fx.adapters import LowRank
from bone_fx.errors import VerificationError
from bone_fx.sites import matches_end

_IN_FRONT = re.compile(r"^(?:(?:base_model\.model|module|_orig_mod|_fsdp_wrapped_module)\.)+")
_INSIDE = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PART = re.compile(
    r"^(?P<where>.+?)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
    r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?(?P<end>\.weight|\.bias)?$"
)
_COPY = re.compile(r"\.modules_to_save\.(?:[^.]+\.)?(?=[^.]+$)")


def plain_name(key: str) -> str:
    """A key without what wrappers of a model put in front and in between."""
    return _INSIDE.sub("", _IN_FRONT.sub("", key))


def lora_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, LowRank], dict[str, Tensor], dict[str, tuple[list[int], Tensor]], list[str]]:
    """What a LoRA's tensors are.

    Args:
        config: The content of `adapter_config.json`.
        tensors: By plain name, in float32.
        model: The model that they act on.

    Returns:
        Blocks by layer or parameter, what is added to biases by layer, numbers and values of
        replaced rows by layer, and the names that are left: what was trained whole.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    left = []
    for name, tensor in sorted(tensors.items(), key=lambda item: len(item[0])):
        match = _PART.match(name)
        if match is None:
            left.append(name)
            continue
        what = match["what"] + (".bias" if match["end"] == ".bias" else "")
        layers.setdefault(match["where"], {}).setdefault(what, tensor)
    parameters = _wrapped(config, model)
    blocks: dict[str, LowRank] = {}
    biases, rows = {}, {}
    for layer, parts in layers.items():
        delta = parts.get("token_adapter.trainable_tokens_delta")
        if delta is not None:
            rows[layer] = (_tokens(config, layer), delta)
            continue
        name = parameters.get(layer, layer)
        rank = _of_pattern(config, "rank_pattern", name, config.get("r", 8))
        alpha = _of_pattern(config, "alpha_pattern", name, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        in_table = "lora_embedding_A" in parts
        a_RI, b_OR = (parts[f"lora_embedding_{x}" if in_table else f"lora_{x}"] for x in "AB")
        length = parts.get("lora_magnitude_vector") if config.get("use_dora") else None
        if name in parameters.values():
            blocks[name] = _of_parameter(config, model, name, a_RI, b_OR, scale)
        else:
            blocks[name] = LowRank(a_RI, b_OR, scale, None if length is None else length.view(-1))
        if "lora_B.bias" in parts:
            biases[layer] = scale * parts["lora_B.bias"]
    return blocks, biases, rows, left


def whole_parameter(name: str) -> str:
    """The parameter of the base that a name of something trained whole stands for."""
    return _COPY.sub(".", name).replace(".token_adapter.", ".").replace(".base_layer", "")


def _of_pattern(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    pattern = config.get(field) or {}
    return next((value for key, value in pattern.items() if matches_end(key, name)), default)


def _tokens(config: Mapping[str, Any], layer: str) -> list[int]:
    given = config["trainable_token_indices"]
    if isinstance(given, list):
        return given
    return next(given[name] for name in given if f".{layer}".endswith(f".{name}"))


def _wrapped(config: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    """For each wrapper that PEFT puts around a module, the parameter that it adapts."""
    found: dict[str, str] = {}
    targets = config.get("target_parameters") or []
    for module, owner in model.named_modules():
        mine = [
            f"{module}.{name}"
            for name, _ in owner.named_parameters(recurse=False)
            if any(f".{module}.{name}".endswith(f".{target}") for target in targets)
        ]
        place = module
        for parameter in reversed(mine):
            found[place] = parameter
            place += ".base_layer"
    return found


def _of_parameter(
    config: Mapping[str, Any],
    model: nn.Module,
    name: str,
    a_NI: Tensor,
    b_ON: Tensor,
    scale: float,
) -> LowRank:
    """PEFT's `ParamWrapper`: the block that is added to a parameter as it is stored."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    shape = getattr(module, attribute).shape
    if len(shape) == 2:
        return LowRank(a_NI, b_ON, scale)
    experts, first, second = shape
    a_ERI = a_NI.reshape(experts, -1, a_NI.shape[1])
    b_EOR = b_ON.reshape(len(b_ON), -1, experts).movedim(2, 0)
    added = (b_ON.shape[0], a_NI.shape[1])
    if {added, added[::-1]} & {(first, second)} == set():
        raise VerificationError(
            f"verification failed: the adapter's block does not fit {name}",
            expected=list(shape),
            found=list(added),
            next_step="use the base model that the adapter was trained on",
        )
    inputs_first = added != (first, second)
    if first == second:
        version = [int(n) for n in str(config["peft_version"]).split(".")[:2]]
        transposed = bool(getattr(module, "is_transposed", False))
        inputs_first = version < [0, 19] or transposed == (version >= [0, 20])
    if inputs_first:  # e i o
        return LowRank(b_EOR.transpose(1, 2), a_ERI.transpose(1, 2), scale)
    return LowRank(a_ERI, b_EOR, scale)  # e o i
