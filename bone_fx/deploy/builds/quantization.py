"""Quantized products in a checkpoint's graph, as the options ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch

from bone_fx.deploy.builds.calibrate import Calibration
from bone_fx.deploy.builds.quantized_experts import bytes_of, quantize_experts
from bone_fx.deploy.builds.weight_only import weight_only_products
from bone_fx.deploy.options import BITS, HEAD, ExportOptions, Provider
from bone_fx.onnx.quantize import Quantization, QuantizeWeights
from bone_fx.weights.recipes.nbits import Scheme
from bone_fx.weights.recipes.quantized import Part


@dataclass(frozen=True)
class QuantizationReport:
    """What a quantization did.

    Attributes:
        entries: For the manifest.
        notes: What a person should know.
        session_options: What onnxruntime is to be told when it opens the graph.
    """

    entries: dict[str, Any]
    notes: tuple[str, ...]
    session_options: Mapping[str, str] = field(default_factory=dict)


def quantization_of(options: ExportOptions) -> Quantization:
    """What the options of a quantized export ask for."""
    scale = torch.float16 if options.activation_dtype == "fp16" else torch.float32

    def scheme(dtype: str) -> Scheme:
        return Scheme(BITS[dtype], *options.form, scale_dtype=scale)

    def part(choice: str | None) -> Scheme | None:
        return scheme(choice) if choice in BITS else None

    return Quantization(
        scheme(options.weight_dtype),
        part(options.head or HEAD),
        part(options.embeddings),
        follow_head=options.embeddings is None,
        accuracy_level=4 if options.provider == "cpu" else 0,
    )


def quantize(
    model: ir.Model, plan: Quantization, calibration: Calibration, provider: Provider
) -> QuantizationReport:
    """Replace the products and the experts of a model by quantized ones, in place.

    Args:
        model: The model.
        plan: What is quantized, and how.
        calibration: What the products' inputs are on a text.
        provider: What the graph is written for.
    """
    step = QuantizeWeights(plan, calibration.moments)
    step(model)
    experts = quantize_experts(model, plan, calibration.moments, provider)
    measured = calibration.entries
    notes = [
        *calibration.notes,
        *(f"{name} is not quantized: {why}" for name, why in step.done.kept.items()),
        *experts.notes,
    ]
    if not step.done.products:
        notes.append("no product of the graph could be quantized")
    entries = {
        "weights": _described(plan.weights),
        "head": _described(plan.head),
        "embeddings": _described(plan.embeddings),
        "accuracy_level": plan.accuracy_level,
        "calibration": measured and {**measured, "products": len(step.done.weighted)},
        "products": len(step.done.products),
        "bytes": bytes_of(model, Part),
        "gathered": sorted(step.done.embeddings),
        "kept": step.done.kept,
        "experts": experts.entries,
    }
    if provider != "cuda":
        return QuantizationReport(entries, tuple(notes))
    placed = weight_only_products(model.graph)
    entries["weight_only"] = placed.entries()
    return QuantizationReport(entries, (*notes, *placed.notes()), placed.session_options)


def _described(scheme: Scheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {
        "bits": scheme.bits,
        "block_size": scheme.block_size,
        "symmetric": scheme.symmetric,
    }
