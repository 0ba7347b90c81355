"""`aten.gelu` as one operator of ONNX Runtime's own; opset 18 has none and takes five."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch

_KERNELS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

GELU = torch.ops.aten.gelu.default


def translations(torchlib: Any, contrib: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    """The translation table that torch's exporter takes.

    Args:
        torchlib: Torchlib's translation, which still takes dtypes without a kernel.
        contrib: Records an operator of ONNX Runtime's own: (op_type, inputs, attributes, dtype).
    """

    def gelu(self: Any, approximate: str = "none") -> Any:
        if self.dtype not in _KERNELS:
            return torchlib(self, approximate)
        kind = "FastGelu" if approximate == "tanh" else "Gelu"
        return contrib(kind, [self], {}, self.dtype)

    return {GELU: gelu}
