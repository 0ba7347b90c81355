"""A module, graph or program of the user's own, with the weights it has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bone_fx.deploy.builds.base import Build
from bone_fx.errors import UsageError
from bone_fx.progress import Progress
from bone_fx.verify.parity import Parity

_DTYPES = {
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT: "fp32",
    ir.DataType.DOUBLE: "fp64",
}


@dataclass
class ModuleBuild(Build):
    """A module, graph or program of the user's own."""

    call: Callable[..., Any] | None = None
    example: Any = ()

    def verify(self, folder: Path, provider: str, mode: str) -> Parity:
        """Compare the written model with the module, on the example and on other batch sizes."""
        from bone_fx.runtime.session import open_session
        from bone_fx.verify.compare_forward import verify_module

        assert self.call is not None
        session = open_session(folder / "model.onnx", provider)
        return verify_module(session, self.call, self.example, dtype=self.dtype)


def build_module(
    base: object, example_inputs: Any, dynamic_shapes: Any, provider: str, told: Progress
) -> ModuleBuild:
    """Capture a module, graph or program of the user's own with the weights it has.

    Raises:
        ExportError: For CUDA, an operator has no kernel there.
    """
    from bone_fx.capture.forward import capture_forward
    from bone_fx.onnx.forward_model import forward_model
    from bone_fx.train.adapted_module import AdaptedModule

    told.stage("capture")
    if isinstance(base, AdaptedModule):
        base = base.fold()
    if not isinstance(base, nn.Module | ExportedProgram):
        raise UsageError(
            f"cannot export a {type(base).__name__}",
            expected="a path, a module or an ExportedProgram",
        )
    if isinstance(base, ExportedProgram) and example_inputs is None:
        example_inputs = (
            base.example_inputs[1] or base.example_inputs[0] if base.example_inputs else ()
        )
    capture = capture_forward(base, example_inputs, dynamic_shapes=dynamic_shapes)
    told.stage("translate to ONNX")
    translated = forward_model(capture, skip_norms=provider == "cuda")
    build = ModuleBuild(
        translated,
        "module",
        architecture=type(base).__name__,
        dtype=_dtype_of(translated),
        base_name=type(base).__name__,
        notes=list(capture.notes),
        call=_evaluated(base.module() if isinstance(base, ExportedProgram) else base),
        example=example_inputs,
    )
    if provider == "cuda":
        build.place_on_cuda("export for the CPU, or replace the operator in the module")
    return build


def _evaluated(module: nn.Module) -> Callable[..., Any]:
    """The module's call in evaluation mode; its buffers and its inputs are as before afterwards.

    A graph is called without the guards of its trace, which hold for the sizes of its examples.
    """
    from bone_fx.capture.forward import evaluation_copy

    called = evaluation_copy(module) if isinstance(module, fx.GraphModule) else module

    def call(*args: Any, **kwargs: Any) -> Any:
        training = called.training
        before = [(buffer, buffer.clone()) for buffer in called.buffers()]
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        nn.Module.train(called, False)
        try:
            return called(*args, **kwargs)
        finally:
            nn.Module.train(called, training)
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)

    return call


def _dtype_of(model: ir.Model) -> str:
    """The narrowest floating dtype of the inputs and constants."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    kinds = {value.dtype for value in values}
    return next((name for kind, name in _DTYPES.items() if kind in kinds), "fp32")
