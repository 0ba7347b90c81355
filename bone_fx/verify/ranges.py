"""Activations that a 16-bit graph cannot hold.

ONNX Runtime's CPU provider computes most fp16 nodes in fp32 and drops the casts between them, so an
overflow that a GPU would meet does not show there. The torch reference, in float32, shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.errors import VerificationError

LARGEST = {"fp16": torch.finfo(torch.float16).max}


@contextmanager
def within_range(model: nn.Module, dtype: str) -> Iterator[None]:
    """A context in which the inputs and outputs of a model's layers must fit a dtype.

    Raises:
        VerificationError: A value does not; the message names the layer.
    """
    with ExitStack() as stack:
        if dtype in LARGEST:
            for name, module in model.named_modules():
                if not any(module.children()):
                    stack.callback(
                        module.register_forward_hook(_check(name, LARGEST[dtype])).remove
                    )
        yield


def _check(name: str, largest: float) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for side, value in (("input", args[0] if args else None), ("output", output)):
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
                continue
            reached = float(value.abs().max())
            if reached > largest:
                raise VerificationError(
                    f"verification failed: the {side} of {name} overflows fp16",
                    expected=f"values up to {largest:.6g}",
                    found=f"{reached:.6g}",
                    next_step="export with --dtype fp32",
                )

    return hook
