"""Ordinary tensors outside of traces, and casts that cost nothing where nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def on_plain_cpu(*tensors: Tensor) -> bool:
    """Whether all are ordinary tensors on a CPU, outside of `torch.compile` and of traces."""
    return all(tensor.is_cpu for tensor in tensors) and is_plain(*tensors)


def is_plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary tensors, outside of `torch.compile` and of traces."""
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return not (torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling())


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, without a call into PyTorch where nothing changes."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
