"""The translations of ATen operators that PyTorch and onnxscript bring along.

`ONNXRegistry.from_torchlib` prepares all six hundred of them, which takes longer than translating a
decoder; here each is prepared when a graph first asks for it. Tried with torch 2.13.0 and
onnxscript 0.7.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from onnxscript.function_libs.torch_lib import ops  # noqa: F401 - fills the registry
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch.onnx._internal.exporter._registration import (
    OnnxDecompMeta,
    ONNXRegistry,
    _get_overload,
)
from torch.onnx._internal.exporter._torchlib._torchlib_registry import get_torchlib_ops


class TorchLib(ONNXRegistry):
    """What `ONNXRegistry.from_torchlib()` holds, each prepared when it is asked for."""

    def __init__(self) -> None:
        """Only PyTorch's own translations, which are few, are prepared."""
        super().__init__()
        self._asked: set[Any] = set()
        for meta in get_torchlib_ops():
            self._register(meta.fx_target, meta)
        self._cleanup_registry_based_on_opset_version()

    def get_decomps(self, target: Any) -> list[OnnxDecompMeta]:
        """The translations of an operator, custom ones first; none if it is not known."""
        key = str(target) if isinstance(target, torch._ops.OpOverload) else target
        if key not in self._asked:
            self._asked.add(key)
            for meta in _from_onnxscript(target):
                self._register(target, meta)
        return super().get_decomps(target)


def _from_onnxscript(target: Any) -> Iterator[OnnxDecompMeta]:
    for name in _names(target):
        if name not in default_registry or _get_overload(name) != target:
            continue
        entry = default_registry[name]
        for functions, is_complex in ((entry.overloads, False), (entry.complex, True)):
            for function in functions:
                yield OnnxDecompMeta(
                    onnx_function=function, fx_target=target, signature=None, is_complex=is_complex
                )


def _names(target: Any) -> tuple[str, ...]:
    """The names under which onnxscript may have registered an operator."""
    if isinstance(target, torch._ops.OpOverload):
        plain = f"{target.namespace}::{target._schema.name.split('::')[-1]}"
        return plain, f"{plain}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    return f"_operator::{name}", f"_operator::__{name}__", f"math::{name}"
