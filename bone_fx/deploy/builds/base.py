"""An export before it is written: an ONNX model over recipes, and what may be done with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bone_fx.onnx.placement import Placement, place
from bone_fx.onnx.writer import write_model
from bone_fx.progress import Progress
from bone_fx.verify.parity import Parity


@dataclass(frozen=True)
class Written:
    """What a build wrote.

    Attributes:
        sha256: SHA-256 by name of the files that were hashed while they were written.
        rounding: What the cast to a half dtype costs the adapters, for the manifest; None for other
            exports.
        change: `‖ΔW‖ / ‖W‖` of each adapted layer; empty without adapters.
        notes: What a person should know.
    """

    sha256: dict[str, str]
    rounding: dict[str, Any] | None = None
    change: Mapping[str, float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Build(ABC):
    """An export before it is written.

    Attributes:
        model: The ONNX model; its constants are recipes.
        kind: `"decoder"`, `"model"` or `"module"`.
        architecture: Class name of what was captured.
        base_name: Name of the base, without its path.
        dtype: Dtype of the weights.
        activations: Dtype of the activations.
        quantization: What was quantized and how; None for a float export.
        kv_cache: What a decoder's cache is kept in, and what its scales are measured on; None where
            it is kept in floats.
        placement: For CUDA, where each node runs; None for a graph for the CPU.
        notes: What a person should know.
    """

    model: ir.Model
    kind: str
    architecture: str
    base_name: str
    dtype: str
    activations: str
    quantization: dict[str, Any] | None
    kv_cache: dict[str, Any] | None
    placement: Placement | None
    notes: tuple[str, ...]

    @abstractmethod
    def base_files(self) -> dict[str, str]:
        """SHA-256 of the base's weight files by name."""

    def origin(self) -> dict[str, Any]:
        """Licence and base of the base, as its own files state them."""
        return {}

    @abstractmethod
    def write(self, folder: Path, progress: Progress) -> Written:
        """Write the model, and what stands beside it, into a folder."""

    @abstractmethod
    def verify(
        self, folder: Path, provider: str, level: str, samples: str | Path | None = None
    ) -> Parity:
        """Compare the written model with torch.

        Args:
            folder: Where the model was written.
            provider: ONNX Runtime's provider to run it on, `"cpu"` or `"cuda"`.
            level: `"full"` or `"fast"`.
            samples: A text whose likelihood is measured.

        Raises:
            VerificationError: They disagree.
        """


def write_graph(model: ir.Model, folder: Path, progress: Progress) -> dict[str, str]:
    """Write a model into a folder; returns SHA-256 of its files by name."""
    written = write_model(model, folder, progress.advance)
    return {file.name: file.sha256 for file in written.files}


def cuda_placement(model: ir.Model, next_step: str, *, grows: bool = False) -> Placement:
    """Where each node of a model for CUDA runs.

    Args:
        model: The model.
        next_step: What to do if a node has no CUDA kernel.
        grows: Whether the cache is concatenated, so that its shape is another in every step.

    Raises:
        ExportError: A node has no CUDA kernel; the message names it and says `next_step`.
    """
    placement = place(model)
    placement.grows = grows
    placement.require_kernels(next_step)
    return placement
