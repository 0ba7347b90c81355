"""A model's outputs as a flat tuple of tensors with names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree


def flat_outputs(output: Any) -> tuple[tuple[torch.Tensor, ...], tuple[str, ...]]:
    """Tensors of an output in order, and their names.

    Fields of a transformers output and keys of a dict keep their names (`last_hidden_state`,
    `hidden_states.0`), a lone tensor is `output`, the items of a tuple are `output_0`, `output_1`,
    ... What is no tensor is left out.
    """
    if isinstance(output, torch.Tensor):
        return (output,), ("output",)
    pairs = list(_walk(output, ""))
    return tuple(tensor for _, tensor in pairs), tuple(name for name, _ in pairs)


def different_from(names: Iterable[str], taken: Iterable[str]) -> tuple[str, ...]:
    """The names, with `_out` added to those that are taken."""
    used = set(taken)
    result = []
    for name in names:
        while name in used:
            name += "_out"
        used.add(name)
        result.append(name)
    return tuple(result)


def _walk(value: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)):
        named = getattr(value, "_fields", range(len(value)))
        for key, item in zip(named, value, strict=True):
            first = str(key) if isinstance(key, str) else f"output_{key}"
            yield from _walk(item, f"{prefix}.{key}" if prefix else first)
    elif not _is_plain(value):
        for place, leaf in enumerate(pytree.tree_leaves(value)):
            if isinstance(leaf, torch.Tensor):
                yield (f"{prefix}.{place}" if prefix else f"output_{place}"), leaf


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
