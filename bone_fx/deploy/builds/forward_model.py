"""A captured forward as an ONNX model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx_ir as ir

from bone_fx.onnx.translate import translate
from bone_fx.weights.recipes.recipe import Recipe

if TYPE_CHECKING:
    from bone_fx.capture.forward import ForwardCapture


def forward_model(
    capture: ForwardCapture,
    recipes: Mapping[str, Recipe] | None = None,
    *,
    skip_norms: bool = False,
) -> ir.Model:
    """Translates a capture; see `translate` for what it raises.

    Args:
        capture: From `bone_fx.capture.forward.capture_forward`.
        recipes: Name of a parameter or buffer -> where its bytes come from; needed for those that
            are fake. Those that are real need none: they are written as they are.
        skip_norms: Whether to join residual additions and layer norms, which pays on CUDA only.
    """
    return translate(
        capture.program,
        recipes or {},
        input_names=capture.input_names,
        output_names=capture.output_names,
        dim_names=capture.dim_names,
        skip_norms=skip_norms,
    )
