"""Which tensors may be given to what no trace can see: another library, memory that is kept."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def on_plain_cpu(*tensors: Tensor) -> bool:
    """Whether all are ordinary tensors on a CPU, outside of `torch.compile` and of traces."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    return all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
