"""Tensors of a checkpoint that the model does not take: harmless, left out by name, or refused.

A tensor inside a module that the model has (a bias that the configuration leaves out, the scale of
a quantization that config.json does not declare, a layer too many) would have changed the outputs:
it is refused. A module that the model's class does not have (the head of another task, the tower of
another modality) is left out, and named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from bone_fx.errors import BaseModelError, some
from bone_fx.weights.load_plan import LoadPlan
from bone_fx.weights.recipes.recipe import Read
from bone_fx.weights.storage.safetensors_file import same_bytes

_SHOWN = 4
_TENSOR_ENDS = (".weight", ".bias")
"""Ends of the names of a GGUF file's tensors, which its values do not have."""
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.(original_)?inv_freq$")
_INDICES = re.compile(r"(^|\.)(position_ids|relative_position_index|num_batches_tracked)$")
_MASKS = re.compile(r"(^|\.)\w*(attn|attention)\.(bias|masked_bias)$", re.IGNORECASE)
_HEAD = re.compile(
    r"head|classif|predict|pool|score|logit|summary|^cls$|^qa_outputs$|^vocab_|^pred_|^mlm|^nsp|"
    r"^sop_|relationship|^proj_out$|^projection$|_projection$|^decoder$|^quantizer$|^project_|"
    r"^neck$|^(class|bbox)_embed$|^mtp|draft|^fc$|generator|discriminator|value|reward",
    re.IGNORECASE,
)
_OF_THE_BODY = re.compile(r"norm|scale|temperature", re.IGNORECASE)
"""In the name of a module that looks like a head's, and changes what the body computes."""
_TOWER = re.compile(
    r"vision|visual|image|audio|speech|video|tower|projector|multi_?modal|^mm_|connector|resampler|"
    r"qformer|perceiver|talker|token2wav|code2wav|vocoder|^text_(model|encoder|decoder)$",
    re.IGNORECASE,
)
_SCALES = re.compile(
    r"(scales?(_inv|_\d)?|zeros|zero_points?|qweight|g_idx|absmax|quant_map|quant_state\S*|SCB)$"
)


def matching(names: Iterable[str], patterns: Collection[str]) -> list[str]:
    """The names that one of the patterns of `--allow-unused` is, or matches as file names do."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def account_for_unused(
    model: nn.Module,
    plan: LoadPlan,
    stored: Mapping[str, Read],
    allowed: Collection[str] = (),
    unread: Collection[str] = (),
) -> list[str]:
    """What to tell a person about the tensors that a model does not take.

    Args:
        model: The model.
        plan: How the checkpoint's names become the model's.
        stored: Every tensor of the checkpoint under its name on disk.
        allowed: Patterns of tensors that the person gives up.
        unread: Names of tensors and values of a GGUF file that transformers did not read.

    Returns:
        Notes: what is left out, by module.

    Raises:
        BaseModelError: Tensors that would have changed the outputs are left.
    """
    given_up = set(matching([*plan.unexpected, *unread], allowed))
    left_out: dict[str, list[str]] = {}
    refused = {name: name for name in unread if name not in given_up}
    if values := [name for name in refused if not name.endswith(_TENSOR_ENDS)]:
        raise BaseModelError(
            f"the GGUF file says {values[0]}, which transformers does not read: the model would "
            "compute something else",
            expected="values that become fields of the model's configuration",
            found=_listed(values),
            next_step="use the model's safetensors checkpoint, or "
            f"--allow-unused '{values[0]}' if the model is right without it",
        )
    doubtful: dict[str, str] = {}
    for key, name in plan.unexpected.items():
        if key in given_up or _is_harmless(key, stored[key]) or _is_copy(key, name, plan, stored):
            continue
        module = _absent_module(model, name)
        if module is None or not (_HEAD.search(module) or _TOWER.search(module)):
            refused[key] = name
        elif _OF_THE_BODY.search(module):
            doubtful[key] = name
        else:
            left_out.setdefault(module, []).append(key)
    if not any(_TOWER.search(module) for module in left_out):  # `logit_scale` of two towers
        refused |= doubtful
    for key, name in plan.ignored.items():
        module = _absent_module(model, name)
        if module is not None and _TOWER.search(module):
            left_out.setdefault(module, []).append(key)
    if refused:
        raise _unused(model, plan, refused)
    kind = type(model).__name__
    notes = [
        f"left out: {module} of the base ({_count(keys)}), which {kind} does not have"
        for module, keys in left_out.items()
    ]
    if given_up:
        notes.append(f"left out as allowed: {_listed(sorted(given_up))} of the base")
    return notes


def _is_harmless(key: str, read: Read) -> bool:
    """Whether a tensor is a constant that every version of the model computes by itself."""
    if _FREQUENCIES.search(key):
        return True
    if _INDICES.search(key):
        return not read.dtype.is_floating_point
    is_mask = read.shape[:2] == (1, 1) and len(read.shape) == 4
    return bool(_MASKS.search(key)) and (is_mask or math.prod(read.shape) == 1)


def _is_copy(key: str, name: str, plan: LoadPlan, stored: Mapping[str, Read]) -> bool:
    """Whether a tensor is the same, bit for bit, as the one that the model takes."""
    source = plan.sources.get(name)
    if source is None or source.convert is not None:
        return False
    one, other = stored[key], stored[source.keys[0]]
    return same_bytes(one.path, one.entry, other.path, other.entry)


def _absent_module(model: nn.Module, name: str) -> str | None:
    """The outermost module of a tensor that the model lacks; None if it has them all.

    None too inside a list of layers, whose modules are no heads and no towers. A tensor that
    belongs to no module stands for itself.
    """
    prefix = getattr(model, "base_model_prefix", "")
    if prefix not in model._modules:  # the model is a body, and the tensor a whole model's
        name = name.removeprefix(f"{prefix}.")
    path, _, leaf = name.rpartition(".")
    if not path:
        return leaf
    module = model
    for part in path.split("."):
        if part not in module._modules:
            return None if isinstance(module, nn.ModuleList) or part.isdecimal() else part
        found = module._modules[part]
        if found is None:
            return part
        if part.isdecimal():
            return None
        module = found
    return None


def _unused(model: nn.Module, plan: LoadPlan, refused: Mapping[str, str]) -> BaseModelError:
    first = next(iter(refused))
    next_step = (
        "use the config.json and the class that belong to these weights, or "
        f"--allow-unused '{first}' if the model is right without it"
    )
    if _SCALES.search(first):
        next_step = "use the unquantized model, or dequantize it first"
    return BaseModelError(
        f"{_count(refused)} of the checkpoint would be lost: {type(model).__name__}, as it is "
        f"described in config.json, does not take {first}",
        expected="a checkpoint whose tensors are all used",
        found=f"{_listed(list(refused))}: {_meaning(model, plan, first, refused[first])}",
        next_step=next_step,
    )


def _meaning(model: nn.Module, plan: LoadPlan, key: str, name: str) -> str:
    """What a tensor that is left over is, as far as its name says."""
    owner, _, leaf = name.rpartition(".")
    modules = {path for path, _ in model.named_modules()}
    if _SCALES.search(key):
        return (
            "part of a quantization that config.json does not declare (see hf_quant_config.json or "
            "quantize_config.json, if there is one); without it the weights are not these"
        )
    if name in plan.sources:
        return f"a second tensor beside {plan.sources[name].keys[0]}, with other values"
    if leaf == "bias" and owner in modules:
        return "a bias, and config.json builds the layer without one"
    if any(part.isdecimal() and _parent(name, part) in modules for part in name.split(".")):
        return "part of a layer that config.json does not count or build so"
    return "a part that the model does not have"


def _parent(name: str, part: str) -> str:
    return name.partition(f".{part}.")[0]


def _count(names: Collection[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) != 1 else ''}"


def _listed(names: Collection[str]) -> str:
    return some(list(names), _SHOWN)
