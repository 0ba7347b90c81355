"""Sizes in a configuration, checked against the tensors before anything is built from them.

A file of a kilobyte can ask for a model of a million layers. What a configuration says of a size
must be seen in the shapes of the checkpoint, or be small; building it is watched besides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bone_fx.base.sizes.gguf_header import read_head
from bone_fx.errors import BaseModelError

_COUNTS = re.compile(r"layers?$|layers?_|depth|blocks?$|stages?$|experts?$|n_predict|repeats?$")
"""Fields that say how often something is built."""
_LABELS = re.compile(r"labels?$|classes$")
"""Fields of which transformers makes a table when it reads the configuration."""
_POSITIONS = re.compile(r"max_position|n_positions|n_ctx|max_seq|seq_len|max_source|max_target")
"""Fields of which a decoder's tables of cosines and sines have a row each."""
_NO_SIZES = re.compile(
    r"position|context|length|window|chunk|seq|theta|_id$|_ids$|token|factor|rate$|max_|_base$|beta"
)
"""Fields that are no size of a tensor: positions, ids, factors."""

_FREE_COUNT = 512
"""So many layers are built in seconds, whatever the checkpoint holds."""
_FREE_SIZE = 1 << 20
_FREE_POSITIONS = 1 << 21
_BYTES_OF_A_POSITION = 64
"""A model of so few for each position of its context would be smaller than its tables."""
_FREE_LABELS = 100_000
_LARGEST = 1 << 53
"""Above it an integer is no number of anything that a model has."""
_FREE_BYTES = 1 << 30
_DEPTH = 8


def refuse_impossible_sizes(
    where: Path, raw: Mapping[str, Any], shapes: Collection[tuple[int, ...]], stored: int
) -> None:
    """Refuse a configuration whose sizes the checkpoint cannot have.

    Args:
        where: The file, for the message.
        raw: Its content.
        shapes: Of the checkpoint's tensors.
        stored: Bytes of the checkpoint.

    Raises:
        BaseModelError: A field is too large; the message names it.
    """
    widest = max((max(shape, default=1) for shape in shapes), default=1)
    for name, value in _integers(raw, "", _DEPTH):
        field = name.rpartition(".")[2]
        if _COUNTS.search(field):
            most = max(_FREE_COUNT, len(shapes), widest if "expert" in field else 0)
        elif _LABELS.search(field):
            most = max(_FREE_LABELS, widest)
        elif _POSITIONS.search(field):
            most = max(_FREE_POSITIONS, stored // _BYTES_OF_A_POSITION)
        elif _NO_SIZES.search(field):
            most = _LARGEST
        else:
            most = max(_FREE_SIZE, widest)
        if abs(value) > most:
            shown = (
                str(value) if abs(value) < _LARGEST else f"a number of {value.bit_length()} bits"
            )
            raise BaseModelError(
                f"{where}: {name}={shown} is more than this checkpoint can have",
                expected=f"at most {most}: the widest tensor has {widest}, "
                f"and there are {len(shapes)} tensors",
                found=shown,
                next_step="use the configuration that belongs to these weights",
            )


_OF_GGUF = {
    "block_count": "num_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "expert_count": "num_experts",
    "key_length": "head_dim",
    "value_length": "head_dim",
}
"""What the sizes of a GGUF file are called in a config.json."""


def refuse_impossible_gguf(file: Path) -> None:
    """Refuse a GGUF file whose sizes its tensors cannot have.

    Raises:
        BaseModelError: A value is too large, or the file cannot be read.
    """
    head = read_head(file)
    values = {
        name: {_OF_GGUF.get(name.rpartition(".")[2], name.rpartition(".")[2]): value}
        for name, value in head.values.items()
    }
    refuse_impossible_sizes(file, values, list(head.shapes.values()), file.stat().st_size)


def refuse_kernels(where: Path, raw: Mapping[str, Any]) -> None:
    """Refuse an implementation that transformers would fetch from the hub, and run.

    Raises:
        BaseModelError: A field names a repository.
    """
    for name, value in _texts(raw, "", _DEPTH):
        if "implementation" in name.rpartition(".")[2] and "/" in value:
            raise BaseModelError(
                f"{where}: {name} names code of the hub",
                expected="an implementation that transformers has",
                found=repr(value),
                next_step="take the field away, or --trust-remote-code, if you trust that code",
            )


class BoundedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses to make tensors that are large beside a checkpoint.

    Args:
        nbytes: Bytes of the checkpoint.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._most = _FREE_BYTES + 8 * nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator unless its result would be too large."""
        kwargs = kwargs or {}
        if kwargs.get("device") != torch.device("meta"):
            size = _result_size(func, args)
            if 4 * size > self._most:
                raise MemoryError(f"{func} would make {size:,} values")
        return func(*args, **kwargs)


def _result_size(func: Any, args: Any) -> int:
    """How many values an operator makes, where that is more than what it gets."""
    name = func.overloadpacket.__name__
    if name == "arange":
        ends = [n for n in args if isinstance(n, int | float)]
        start, end, step = (0, ends[0], 1) if len(ends) == 1 else (*ends, 1)[:3]
        return int(abs((end - start) / (step or 1)))
    shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor) and not a.is_meta]
    if not shapes and not any(isinstance(a, torch.Tensor) for a in args):
        if args and isinstance(args[0], list | tuple):
            return math.prod(n for n in args[0] if isinstance(n, int))
        numbers = [int(n) for n in args if isinstance(n, int) and not isinstance(n, bool)]
        return math.prod((numbers * 2)[:2]) if name == "eye" else max(numbers, default=0)
    if name in ("outer", "ger"):
        return math.prod(math.prod(shape) for shape in shapes)
    try:
        return math.prod(np.broadcast_shapes(*shapes)) if shapes else 0
    except ValueError:
        return 0


def _integers(value: Any, name: str, depth: int) -> Iterator[tuple[str, int]]:
    for path, leaf in _leaves(value, name, depth):
        if isinstance(leaf, int) and not isinstance(leaf, bool):
            yield path, leaf


def _texts(value: Any, name: str, depth: int) -> Iterator[tuple[str, str]]:
    for path, leaf in _leaves(value, name, depth):
        if isinstance(leaf, str):
            yield path, leaf


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every number and text in a configuration, under the dotted name of its field."""
    if depth == 0:
        return
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key), depth - 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name, depth - 1)
    else:
        yield name, value
