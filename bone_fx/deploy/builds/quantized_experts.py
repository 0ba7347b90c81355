"""Quantized experts of a checkpoint's graph, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from bone_fx.deploy.options import Provider
from bone_fx.onnx.quantize import Quantization
from bone_fx.onnx.quantize_experts import QuantizeExperts
from bone_fx.onnx.recipe_tensor import recipe_of
from bone_fx.weights.recipes.experts import ExpertsPart
from bone_fx.weights.recipes.recipe import Recipe
from bone_fx.weights.recipes.second_moments import SecondMoments


@dataclass(frozen=True)
class ExpertsReport:
    """What became of experts.

    Attributes:
        entries: For the manifest; None for a graph without experts.
        notes: What a person should know.
    """

    entries: dict[str, Any] | None
    notes: tuple[str, ...]


def quantize_experts(
    model: ir.Model, plan: Quantization, moments: Mapping[int, SecondMoments], provider: Provider
) -> ExpertsReport:
    """Quantize the experts of a model as its products are, in place.

    Args:
        model: The model.
        plan: How its products are quantized.
        moments: Second moments of experts' inputs by the id of their weights' recipe.
        provider: What the graph is written for.
    """
    step = QuantizeExperts(plan.weights, provider, plan.accuracy_level, moments)
    step(model)
    done = step.done
    if not done.mixtures and not done.kept:
        return ExpertsReport(None, ())
    sizes = sorted(set(done.block_sizes))
    size = sizes if len(sizes) > 1 else next(iter(sizes), None)
    entries = {
        "mixtures": len(done.mixtures),
        "weights": len(done.weights),
        "calibrated": len(done.weighted),
        "bits": plan.weights.bits,
        "block_size": size,
        "symmetric": plan.weights.symmetric,
        "bytes": bytes_of(model, ExpertsPart),
        "kept": done.kept,
        "kept_bytes": done.kept_bytes.total(),
    }
    notes = tuple(
        f"experts of {nbytes:,} bytes are not quantized, they stay in {dtype}: {reason}"
        for (dtype, reason), nbytes in done.kept_bytes.items()
    )
    return ExpertsReport(entries, notes)


def bytes_of(model: ir.Model, kind: type[Recipe]) -> int:
    """Bytes of the constants that recipes of one kind make."""
    values = model.graph.initializers.values()
    return sum(
        value.const_value.nbytes
        for value in values
        if isinstance(recipe_of(value), kind) and value.const_value is not None
    )
