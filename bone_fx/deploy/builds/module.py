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

from bone_fx.deploy.builds.base import Build, Written, cuda_placement, write_graph
from bone_fx.deploy.options import ExportOptions
from bone_fx.errors import UsageError
from bone_fx.progress import Progress
from bone_fx.verify.parity import Parity

_DTYPES = {
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.FLOAT: "fp32",
    ir.DataType.DOUBLE: "fp64",
}
"""The floating dtypes, the narrowest first."""

_CASTS = {"Cast", "CastLike"}
_SELECTIONS = {"Gather", "GatherElements", "GatherND", "Slice", "Split", "Where"}
_LAYOUTS = {"Concat", "Expand", "Flatten", "Pad", "Reshape", "Squeeze", "Tile", "Transpose"}
_EXACT = _CASTS | _SELECTIONS | _LAYOUTS | {"Identity", "Shape", "Unsqueeze"}
"""Operators that hand values on as they are (a cast to a wider dtype included)."""


@dataclass(frozen=True)
class ModuleBuild(Build):
    """A module, graph or program of the user's own.

    Attributes:
        call: The module in evaluation mode.
        example: The arguments of one call.
    """

    call: Callable[..., Any]
    example: Any

    def base_files(self) -> dict[str, str]:
        """A module has no files."""
        return {}

    def write(self, folder: Path, progress: Progress) -> Written:
        """Write the model; nothing stands beside it."""
        return Written(write_graph(self.model, folder, progress))

    def verify(
        self, folder: Path, provider: str, level: str, samples: str | Path | None = None
    ) -> Parity:
        """Compare the written model with the module, on the example and on other batch sizes."""
        from bone_fx.runtime.session import open_session
        from bone_fx.verify.compare_forward import verify_module

        session = open_session(folder / "model.onnx", provider)
        return verify_module(session, self.call, self.example, dtype=self.dtype)


def build_module(base: object, options: ExportOptions, progress: Progress) -> ModuleBuild:
    """Capture a module, graph or program of the user's own with the weights it has.

    Raises:
        ExportError: For CUDA, an operator has no kernel there.
    """
    from bone_fx.capture.forward import capture_forward
    from bone_fx.deploy.builds.forward_model import forward_model
    from bone_fx.train.adapted_module import AdaptedModule

    progress.stage("capture")
    if isinstance(base, AdaptedModule):
        base = base.fold()
    if not isinstance(base, nn.Module | ExportedProgram):
        raise UsageError(
            f"cannot export a {type(base).__name__}",
            next_step="give a path, a module or an ExportedProgram",
        )
    example = options.example_inputs
    if isinstance(base, ExportedProgram) and example is None:
        example = base.example_inputs[1] or base.example_inputs[0] if base.example_inputs else ()
    capture = capture_forward(base, example, dynamic_shapes=options.dynamic_shapes)
    progress.stage("translate to ONNX")
    cuda = options.provider == "cuda"
    model = forward_model(capture, skip_norms=cuda)
    dtype = computed_dtype(model)
    next_step = "export for the CPU, or replace the operator in the module"
    return ModuleBuild(
        model=model,
        kind="module",
        architecture=type(base).__name__,
        base_name=type(base).__name__,
        dtype=dtype,
        activations=dtype,
        quantization=None,
        kv_cache=None,
        placement=cuda_placement(model, next_step) if cuda else None,
        notes=tuple(capture.notes),
        call=_evaluated(base.module() if isinstance(base, ExportedProgram) else base),
        example=example,
    )


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


def computed_dtype(model: ir.Model) -> str:
    """The narrowest floating dtype that an operator computes in, or that a value is rounded to.

    A constant of a narrow dtype that is only cast to a wider one does not count: it is exact.
    """
    from bone_fx.onnx.cleanup.infer_dtypes import inferred_dtype

    known = {
        value: value.dtype for value in [*model.graph.inputs, *model.graph.initializers.values()]
    }
    computed: set[ir.DataType | None] = set()
    for node in model.graph.all_nodes():
        given = [known.get(value) or value.dtype for value in node.inputs if value is not None]
        floats = [dtype for dtype in given if dtype in _DTYPES]
        for index, output in enumerate(node.outputs):
            inferred = output.dtype or inferred_dtype(node, index, known.get)
            known[output] = inferred or next(iter(floats), None)
        computed |= set(floats if node.op_type not in _EXACT else [])
        made = known[node.outputs[0]] if node.op_type in _CASTS else None
        if made in _DTYPES and floats and _is_narrower(made, floats[0]):
            computed.add(made)
    kinds = computed or {value.dtype for value in model.graph.outputs}
    return next((name for kind, name in _DTYPES.items() if kind in kinds), "fp32")


def _is_narrower(one: ir.DataType, other: ir.DataType) -> bool:
    widths = list(_DTYPES)
    return widths.index(one) < widths.index(other)
