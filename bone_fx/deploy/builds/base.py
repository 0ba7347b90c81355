"""An export before it is written: an ONNX model over recipes, and how to verify it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bone_fx.onnx.placement import Placement, place
from bone_fx.onnx.torch_exporter import OPSET
from bone_fx.onnx.writer import write_model
from bone_fx.progress import Progress
from bone_fx.verify.parity import Parity
from bone_fx.weights.recipes.rounding import Rounding


@dataclass
class Build:
    """An export before it is written.

    Attributes:
        model: The ONNX model; its constants are recipes.
        kind: `"decoder"`, `"model"` or `"module"`.
        architecture: Class name of what was captured.
        dtype: Dtype of weights, and of activations unless the weights are quantized.
        activations: Dtype of activations; empty if it is `dtype`.
        placement: For CUDA, where each node runs; None for a graph for the CPU.
        quantization: What was quantized and how; None for a float export.
        base_name: Name of the base, without its path.
        notes: What a person should know.
        rounding: What the cast to a half dtype costs the adapters; None for other exports.
        written: SHA-256 of the model's files by name, once it is written.
    """

    model: ir.Model
    kind: str
    architecture: str
    dtype: str
    base_name: str = ""
    notes: list[str] = field(default_factory=list)
    opset: int = OPSET
    activations: str = ""
    quantization: dict[str, Any] | None = None
    placement: Placement | None = None
    rounding: Rounding | None = None
    written: dict[str, str] = field(default_factory=dict)

    def base_files(self) -> dict[str, str]:
        """SHA-256 of the base's weight files by name."""
        return {}

    def place_on_cuda(self, next_step: str) -> None:
        """Find out where each node runs.

        Raises:
            ExportError: One has no CUDA kernel.
        """
        self.placement = place(self.model)
        self.placement.require_kernels(next_step)

    def write(self, folder: Path, told: Progress) -> None:
        """Write the model, and what stands beside it, into a folder."""
        model = write_model(self.model, folder, told.advance)
        self.written = {file.name: file.sha256 for file in model.files}

    def verify(self, folder: Path, provider: str, mode: str) -> Parity:
        """Compare the written model with torch.

        Raises:
            VerificationError: They disagree.
        """
        raise AssertionError(f"{type(self).__name__} has no verification")
