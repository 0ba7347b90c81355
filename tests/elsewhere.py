"""Calls of a module on CUDA tensors without values: no GPU is needed for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree


def call_on_cuda(module: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a call gives with parameters, buffers and inputs on a GPU.

    Tensors without values refuse what a GPU refuses: operators over two devices, and tensors that
    were left behind.
    """
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=False):
        state = {
            name: _on_cuda(tensor)
            for named in (module.named_parameters, module.named_buffers)
            for name, tensor in named(remove_duplicate=False)
        }
        moved = pytree.tree_map_only(Tensor, _on_cuda, dict(inputs))
        output = torch.func.functional_call(module, state, (), moved, tie_weights=False)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _on_cuda(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
