"""What a forward keeps for backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kept(call: Callable[[], Any], *known: Tensor) -> list[Tensor]:
    """The tensors that autograd keeps of a call, those that share memory with `known` left out."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in seen:
            seen.add(place)
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = call()
    del result
    return found


def shapes(tensors: list[Tensor]) -> list[list[int]]:
    return sorted(list(tensor.shape) for tensor in tensors)
