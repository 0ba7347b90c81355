"""What adapters bring besides blocks, and what it makes of the base, as PEFT 0.18.1 has it.

An entry of `modules_to_save` is a copy that acts in its own place alone: of a tied pair the other
side keeps its value, and the pair unties. Other parameters in an adapter's file are the base's own,
resized or moved under `base_layer`: they act wherever the base's tensor does. A block on one side
of a tied pair acts on that side alone, too. Embeddings with more or fewer rows resize the base.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bone_fx.adapter_folder import WEIGHTS_NAME, AdapterFolder, Adapters
from bone_fx.base.unused_tensors import matching
from bone_fx.errors import AdapterError, some
from bone_fx.files.json_file import NotJsonError, read_object
from bone_fx.lora.contents import Rows
from bone_fx.sites import is_saved_module

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBLEMS = ("regression", "single_label_classification", "multi_label_classification")


@dataclass(frozen=True)
class TrainedHeads:
    """What adapters bring besides blocks.

    Attributes:
        tensors: Parameters of the model that come from the adapters, by name.
        vocab_size: Rows of the embeddings, if they are other than the base's.
        untied: Names that get a tensor of their own though the model ties them.
        new_biases: Those of the parameters that the base's layers lack.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    vocab_size: int | None = None
    untied: frozenset[str] = frozenset()
    new_biases: frozenset[str] = frozenset()

    def overrides(self) -> dict[str, Any]:
        """Fields of the configuration that the heads decide."""
        return {} if self.vocab_size is None else {"vocab_size": self.vocab_size}


def brought_tensors(adapters: Adapters) -> dict[str, Tensor]:
    """Every parameter that an adapter brings, by name.

    Raises:
        AdapterError: Two adapters bring different values, or one brings the whole weight of a layer
            to which another before it has a block: the block would be lost, or act on a weight
            that it was not trained on.
    """
    brought: dict[str, tuple[str, Tensor]] = {}
    with_block: dict[str, str] = {}
    for label, adapter in adapters:
        for name, tensor in adapter.modules_to_save.items():
            if name in with_block:
                raise AdapterError(
                    f"adapter {label!r} brings {name} whole, for which adapter "
                    f"{with_block[name]!r} before it has a block",
                    expected="a layer that one of them trains, or the block after the weight",
                    found=_kind(tensor),
                    next_step="export them one by one, or give the adapters in the other order",
                )
            other, value = brought.setdefault(name, (label, tensor))
            if value.shape != tensor.shape or not torch.equal(value, tensor):
                raise AdapterError(
                    f"adapters {other!r} and {label!r} bring different values of {name}",
                    expected="one adapter with this head, or the same values in both",
                    found=f"{_kind(value)} and {_kind(tensor)}",
                    next_step="export them one by one, or take the head out of one of them",
                )
        weights = {f"{site}.weight" for site in adapter.blocks} - adapter.modules_to_save.keys()
        with_block |= dict.fromkeys(weights, label)
    return {name: tensor for name, (_, tensor) in brought.items()}


def without_unused(
    adapters: Adapters, allowed: Sequence[str], model: nn.Module | None
) -> tuple[list[tuple[str, AdapterFolder]], list[str]]:
    """Adapters without the tensors that a person gives up, and notes about those.

    Args:
        adapters: The adapters by name.
        allowed: Patterns of tensors that may be left out if nothing uses them.
        model: The base without weights; None if no adapter brings a parameter.

    Raises:
        AdapterError: A file holds a tensor that means nothing for this kind of adapter.
    """
    kept, notes = [], []
    taken = set() if model is None else _names(model)
    for label, adapter in adapters:
        heads = matching([name for name in adapter.modules_to_save if name not in taken], allowed)
        unused = matching(adapter.unused, allowed)
        left = [key for key in adapter.unused if key not in unused]
        if left:
            raise AdapterError(
                f"{len(left)} tensors of {adapter.path / WEIGHTS_NAME} would be lost: {left[0]} is "
                f"no part of a {adapter.config.peft_type} adapter",
                expected="blocks of this kind, and modules that were trained whole",
                found=some(left),
                next_step="correct its configuration (peft_type, use_dora, lora_bias), or "
                f"--allow-unused '{left[0]}' if the adapter is right without it",
            )
        trained = getattr(adapter.config, "bias", "none")
        if trained != "none" and not any(n.endswith("bias") for n in adapter.modules_to_save):
            notes.append(
                f"adapter {label!r} was trained with bias={trained}, and its file holds no bias: "
                "PEFT loads the base's own, and so does this"
            )
        given_up = [*heads, *unused]
        if given_up:
            notes.append(f"left out as allowed: {', '.join(given_up)} of adapter {label!r}")
        rest = {k: v for k, v in adapter.modules_to_save.items() if k not in heads}
        whole = replace(adapter, modules_to_save=rest, given_up=tuple(given_up))
        kept.append((label, whole))
    return kept, notes


def _names(model: nn.Module) -> set[str]:
    named = (model.named_parameters, model.named_buffers)
    return {name for tensors in named for name, _ in tensors(remove_duplicate=False)}


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} of mean size {tensor.float().abs().mean().item():.3g}"


def concern_heads(adapters: Adapters) -> bool:
    """Whether an adapter may touch heads or a tied pair, by what its file and configuration say."""
    return any(
        adapter.modules_to_save
        or adapter.config.modules_to_save
        or adapter.stacked
        or adapter.biases
        or adapter.rows
        or any(not _is_in_layer(site) for site in adapter.blocks)
        for _, adapter in adapters
    )


def trained_heads(model: PreTrainedModel, adapters: Adapters) -> TrainedHeads:
    """What adapters make of a model's embeddings and heads.

    Args:
        model: The base without weights, nothing tied yet (`base.skeleton.meta_model`).
        adapters: The adapters by name.

    Raises:
        AdapterError: Two adapters bring different values, a module in `modules_to_save` is not in
            an adapter's file, or resized embeddings lack a part.
    """
    tensors = brought_tensors(adapters)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for label, adapter in adapters:
        _check_whole(label, adapter, model)
    vocab_size = _resized(model, tensors, parameters)
    in_base = frozenset(name for _, adapter in adapters for name in adapter.in_base)
    untied: set[str] = set()
    for group in _tied_groups(model, parameters):
        values = _values(group, tensors, in_base)
        adapted = {name for name in group if _has_block(name, adapters)}
        if adapted:
            _check_apart(adapted, adapters)
        if not adapted and all(_equal(value, values[group[0]]) for value in values.values()):
            tensors |= {name: value for name, value in values.items() if value is not None}
            continue
        untied.update(group)
        tensors |= {name: value for name, value in values.items() if value is not None}
    biases = _new_biases(model, adapters)
    return TrainedHeads({**tensors, **biases}, vocab_size, frozenset(untied), frozenset(biases))


def _check_apart(names: Collection[str], adapters: Adapters) -> None:
    """Refuse a block of a tied pair that was trained to act on both sides."""
    for label, adapter in adapters:
        together = getattr(adapter.config, "ensure_weight_tying", False)
        if together and any(_has_block(name, [(label, adapter)]) for name in names):
            raise AdapterError(
                f"adapter {label!r} acts on {', '.join(sorted(names))} with ensure_weight_tying",
                expected="blocks of a tied pair that act on one side of it",
                next_step="merge it in PEFT (merge_and_unload), and give that model as the base",
            )


def replaced_rows(adapters: Adapters, parameters: Mapping[str, Any]) -> dict[str, Rows]:
    """Rows that adapters replace, by name of the table.

    Args:
        adapters: The adapters by name.
        parameters: Parameters of the model, or their recipes, by name.

    Raises:
        AdapterError: There is no such table, it has other rows, or two adapters replace some.
    """
    replaced: dict[str, Rows] = {}
    for label, adapter in adapters:
        for module, rows in adapter.rows.items():
            name = f"{module}.weight"
            table = tuple(parameters[name].shape) if name in parameters else ()
            fits = len(table) == 2 and rows.values.shape[1:] == table[1:]
            if not fits or max(rows.tokens, default=0) >= table[0]:
                raise AdapterError(
                    f"the tokens that adapter {label!r} trained are not the model's: {module}",
                    expected=f"rows of a table {list(table)}" if table else "an embedding",
                    found=f"{list(rows.values.shape)}, up to token {max(rows.tokens, default=0)}",
                    next_step="use the base model that the adapter was trained on",
                )
            if name in replaced or module in adapter.blocks:
                raise AdapterError(
                    f"{module} is trained twice: rows of adapter {label!r}, and others",
                    expected="one adapter that trains it",
                    next_step="export them one by one",
                )
            replaced[name] = rows
    return replaced


def _new_biases(model: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """Biases of zeros for the layers that adapters give one, by name."""
    from bone_fx.lora.biases import lacking_biases

    widths = {
        f"{site}.bias": len(added)
        for _, adapter in adapters
        for site, added in adapter.biases.items()
        if site in adapter.blocks
    }
    return {name: torch.zeros(widths[name]) for name in lacking_biases(model, widths)}


def _tied_groups(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """Names that share one tensor, in the order in which PEFT loads them."""
    tied: dict[str, str] = model.all_tied_weights_keys
    roots = dict.fromkeys(tied.values())
    members = {root: {root, *(name for name in tied if tied[name] == root)} for root in roots}
    return [tuple(name for name in parameters if name in group) for group in members.values()]


def _values(
    group: Sequence[str], tensors: Mapping[str, Tensor], in_base: Collection[str]
) -> dict[str, Tensor | None]:
    """The value of each name of a tied group; None is the base's own."""
    shared = [tensors[name] for name in group if name in in_base]
    alike = all(_equal(value, shared[0]) for value in shared)
    others = shared[-1] if shared else None
    own = {name for name in group if name in tensors and (name not in in_base or not alike)}
    return {name: tensors[name] if name in own else others for name in group}


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or (one.shape == other.shape and torch.equal(one, other))


def _has_block(name: str, adapters: Adapters) -> bool:
    return any(name.removesuffix(".weight") in adapter.blocks for _, adapter in adapters)


def _is_in_layer(site: str) -> bool:
    return any(part.isdecimal() for part in site.split("."))


def _check_whole(label: str, adapter: AdapterFolder, model: PreTrainedModel) -> None:
    """Refuse an adapter whose file lacks a module that its configuration says it trained."""
    brought = adapter.modules_to_save
    tied: dict[str, str] = model.all_tied_weights_keys
    partners = {tied.get(name, name) for name in brought}
    lacking = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in brought
        and tied.get(name, name) not in partners
        and is_saved_module(adapter.config, name.rpartition(".")[0])
    ]
    if lacking:
        raise AdapterError(
            f"adapter {label!r} lists {adapter.config.modules_to_save} in modules_to_save, and its "
            f"file does not hold {lacking[0]}",
            expected=", ".join(lacking[:4]),
            found=", ".join(list(brought)[:4])
            or f"no trained module in {adapter.path / WEIGHTS_NAME}",
            next_step="save the adapter again with PEFT's save_pretrained, on the model it was "
            "trained on: without this head its values would be random",
        )


def _resized(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> int | None:
    """Rows of embeddings that were resized before training; None if they were not.

    Raises:
        AdapterError: Input and output embeddings would have different numbers of rows.
    """
    try:
        output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        modules = [model.get_input_embeddings(), output]
    except NotImplementedError:  # transformers' answer for a model without embeddings of tokens
        return None
    weights = [getattr(module, "weight", None) for module in modules]
    names = [name for name, p in parameters.items() if any(p is weight for weight in weights)]
    rows = {name: len(tensors[name]) for name in names if name in tensors}
    base_rows = {name: len(parameters[name]) for name in names}
    if all(rows[name] == base_rows[name] for name in rows):
        return None
    tied = model.all_tied_weights_keys
    roots = {tied.get(name, name) for name in rows}
    rows |= {name: base_rows[name] for name in names if tied.get(name, name) not in roots}
    if len(set(rows.values())) > 1:
        raise AdapterError(
            "the adapter resizes one side of the embeddings only",
            expected="input and output embeddings of one vocabulary",
            found=", ".join(f"{name} with {number} rows" for name, number in rows.items()),
            next_step="save the adapter with save_embedding_layers=True, or give the base that was "
            "resized",
        )
    return next(iter(rows.values()))


def trained_labels(adapters: Adapters, labels: int) -> dict[str, Any]:
    """Labels and kind of problem of the last adapter that brings a `config.json` with them.

    PEFT does not write that file; a training script that knows its labels does
    (`model.config.save_pretrained(folder)`).

    Args:
        adapters: The adapters by name, in the order in which they apply.
        labels: Classes of the head.

    Returns:
        `id2label`, `label2id` and `problem_type`, as far as there is a label to each class.

    Raises:
        AdapterError: A file cannot be read.
    """
    for _, adapter in reversed(list(adapters)):
        content = _configuration(adapter.path / "config.json")
        names = content.get("id2label")
        if not isinstance(names, dict) or set(names) != {str(n) for n in range(labels)}:
            continue
        if not all(isinstance(name, str) for name in names.values()):
            continue
        problem = content.get("problem_type")
        return {
            "id2label": {n: names[str(n)] for n in range(labels)},
            "label2id": {names[str(n)]: n for n in range(labels)},
            **({"problem_type": problem} if problem in _PROBLEMS else {}),
        }
    return {}


def _configuration(path: Path) -> dict[str, Any]:
    """The content of a configuration; empty if there is none."""
    try:
        return read_object(path)
    except FileNotFoundError:
        return {}
    except NotJsonError as error:
        raise AdapterError(
            f"{path} cannot be read",
            expected="a JSON object",
            found=str(error),
            next_step="save it again with transformers, or take it away",
        ) from error
