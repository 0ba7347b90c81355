"""The tensors of a LoRA's file by what they are.

Keys, without the prefixes that `lora.keys` takes off:

- `<layer>.lora_A.weight` and `lora_B.weight`, with `lora_bias` also `lora_B.bias`;
- `<layer>.lora_magnitude_vector` of DoRA;
- `<embedding>.lora_embedding_A` and `lora_embedding_B`;
- `<module>[.base_layer…].lora_A.weight` of parameters in `target_parameters`, the outermost of
  which is the last parameter of the module (`deploy.trained.sites` names them);
- `<embedding>.token_adapter.trainable_tokens_delta`: rows that replace those of tokens;
- `<parameter>` of modules that were trained whole, and `<layer>.base_layer.<parameter>` of the base
  itself: a resized embedding, or a trained bias.

`<module>.original_module.…`, and what stands beside a plain name under another adapter's name,
PEFT ignores when it loads; so do we. Whatever else a file holds is listed as unused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from bone_fx.adapters import LowRank
from bone_fx.errors import AdapterError, some
from bone_fx.lora.config import LoraConfig
from bone_fx.lora.keys import Key, plain, read_key
from bone_fx.sites import is_target, is_trained_whole

_BASE_LAYER = "base_layer"
_TOKENS = "token_adapter"
_COPY, _ORIGINAL = "modules_to_save", "original_module"


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that replace those of the base.

    Attributes:
        tokens: Their numbers.
        values: The rows, `[len(tokens), D]`.
    """

    tokens: tuple[int, ...]
    values: Tensor


@dataclass
class Contents:
    """What a file holds.

    Attributes:
        blocks: What acts on a weight, by layer.
        stacked: The same of `target_parameters`, by PEFT's name of the module around them.
        biases: What is added to a layer's bias, by layer.
        rows: Rows of embeddings, by layer.
        saved: Tensor by parameter of what is brought whole.
        in_base: Those of them that act wherever the base's tensor does.
        unused: Keys of tensors that mean nothing.
    """

    blocks: dict[str, LowRank] = field(default_factory=dict)
    stacked: dict[str, LowRank] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Rows] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    in_base: set[str] = field(default_factory=set)
    unused: list[str] = field(default_factory=list)


Parts = dict[tuple[str, str], Tensor]
"""The tensors of one layer by leaf and end."""


def sorted_contents(config: LoraConfig, tensors: Mapping[str, Tensor], path: Path) -> Contents:
    """Sort the tensors of a file.

    Args:
        config: The adapter's configuration.
        tensors: By key.
        path: The file, for messages.

    Raises:
        AdapterError: A layer lacks a part, or has another rank than the configuration says.
        SiteError: A pattern of the configuration is no regular expression.
    """
    contents = Contents()
    names: dict[str, str] = {}
    for key in sorted(tensors, key=len):  # PEFT's own name of a tensor before another of it
        if names.setdefault(plain(key), key) != key:
            contents.unused.append(key)
    of_adapter = {name: part for name in names if (part := read_key(name)) is not None}
    for site, keys in _by_site(of_adapter).items():
        parts = _one_adapter(keys, path)
        values = {part: tensors[names[name]].float() for part, name in parts.items()}
        _take(contents, config, site, values, path)
        contents.unused += [names[name] for part, name in parts.items() if part in values]
    adapted = {*contents.blocks, *contents.stacked, *contents.rows}
    others = {name: tensors[key] for name, key in names.items() if name not in of_adapter}
    for name, tensor in others.items():
        parameter = _parameter(name)
        if parameter is None or (_COPY in name.split(".") and parameter in others):
            continue
        in_wrapped = parameter == name and name.rpartition(".")[0] in adapted
        if in_wrapped or parameter in contents.saved:
            contents.unused.append(names[name])
            continue
        contents.saved[parameter] = tensor
        if config.ensure_weight_tying or not is_trained_whole(config, parameter):
            contents.in_base.add(parameter)
    return contents


def _by_site(keys: Mapping[str, Key]) -> dict[str, dict[str, Key]]:
    by_site: dict[str, dict[str, Key]] = {}
    for name, key in keys.items():
        by_site.setdefault(key.site, {})[name] = key
    return by_site


def _one_adapter(keys: Mapping[str, Key], path: Path) -> dict[tuple[str, str], str]:
    """The names of one adapter's parts in a layer: of the one without a name, or of the only one.

    Raises:
        AdapterError: There are several, and all have names.
    """
    adapters = sorted({key.adapter for key in keys.values()})
    if "" not in adapters and len(adapters) > 1:
        raise AdapterError(
            f"{path} holds several adapters",
            expected="one",
            found=some(adapters),
            next_step="save each by itself, with PEFT's save_pretrained",
        )
    return {(key.leaf, key.end): n for n, key in keys.items() if key.adapter == adapters[0]}


def _take(contents: Contents, config: LoraConfig, site: str, parts: Parts, path: Path) -> None:
    """Take a layer's tensors out of `parts` into the contents; what means nothing stays."""
    if site.endswith(f".{_TOKENS}"):
        values = parts.pop(("trainable_tokens_delta", ""), None)
        if values is not None:
            module = site.removesuffix(f".{_TOKENS}")
            contents.rows[module] = _rows(config, module, values, path)
        return
    embedding = ("lora_embedding_A", "") in parts
    pair = (
        [("lora_embedding_A", ""), ("lora_embedding_B", "")]
        if embedding
        else [("lora_A", "weight"), ("lora_B", "weight")]
    )
    lacking = [".".join(part).rstrip(".") for part in pair if part not in parts]
    if lacking:
        raise _lacking(path, site, lacking)
    a_RI, b_OR = (parts.pop(part) for part in pair)
    if a_RI.dim() != 2 or b_OR.dim() != 2:
        raise _misshapen(path, site, "matrices A [r, in] and B [out, r]", a_RI, b_OR)
    magnitude = None
    if config.use_dora:
        ends = [("lora_magnitude_vector", end) for end in ("", "weight")]
        magnitude = next((parts.pop(part) for part in ends if part in parts), None)
        if magnitude is None:
            raise _lacking(path, site, ["lora_magnitude_vector"])
        magnitude = magnitude.flatten()
    if config.lora_bias and not embedding and ("lora_B", "bias") in parts:
        contents.biases[site] = parts.pop(("lora_B", "bias")) * config.scale(site)
    if _is_stacked(config, site):
        contents.stacked[site] = LowRank(a_RI, b_OR, 1.0, magnitude)
        return
    rank = config.rank(site)
    if (a_RI.shape[0], b_OR.shape[1]) != (rank, rank):
        raise _misshapen(path, site, f"rank {rank}, as its configuration says", a_RI, b_OR)
    contents.blocks[site] = LowRank(a_RI, b_OR, config.scale(site), magnitude)


def _is_stacked(config: LoraConfig, site: str) -> bool:
    """Whether PEFT wrapped parameters of a module there, not the module."""
    module = site
    while module.endswith(f".{_BASE_LAYER}"):
        module = module.removesuffix(f".{_BASE_LAYER}")
    owners = {target.rpartition(".")[0] for target in config.target_parameters or ()}
    if any(owner and f".{module}".endswith(f".{owner}") for owner in owners):
        return True
    return "" in owners and not is_target(config, module)


def _rows(config: LoraConfig, module: str, values: Tensor, path: Path) -> Rows:
    tokens = config.tokens(module)
    if tokens is None or len(set(tokens)) != len(tokens) or values.shape[:1] != (len(tokens),):
        raise AdapterError(
            f"{path}: the trained tokens of {module} are not those of its configuration",
            expected=f"{len(values)} numbers of tokens in trainable_token_indices",
            found=str(tokens),
            next_step="save the adapter again with PEFT's save_pretrained",
        )
    return Rows(tuple(tokens), values)


def _parameter(name: str) -> str | None:
    """The parameter that a name in PEFT's model stands for; None for a copy of the base's."""
    parts = name.split(".")
    if _ORIGINAL in parts:
        return None
    if _COPY in parts:  # <module>.modules_to_save[.<adapter>].<parameter>
        place = parts.index(_COPY)
        parts = [*parts[:place], parts[-1]] if len(parts) - place in (2, 3) else parts
    return ".".join(part for part in parts if part not in (_BASE_LAYER, _TOKENS))


def _lacking(path: Path, site: str, parts: list[str]) -> AdapterError:
    return AdapterError(
        f"{path}: {site} lacks {' and '.join(parts)}",
        expected="lora_A and lora_B of each layer, with use_dora its lora_magnitude_vector",
        next_step="save the adapter again with PEFT's save_pretrained, or copy the whole file",
    )


def _misshapen(path: Path, site: str, expected: str, a_RI: Tensor, b_OR: Tensor) -> AdapterError:
    return AdapterError(
        f"{path}: the matrices of {site} have wrong shapes",
        expected=expected,
        found=f"{list(a_RI.shape)} and {list(b_OR.shape)}",
        next_step="use the adapter_config.json that belongs to this file",
    )
