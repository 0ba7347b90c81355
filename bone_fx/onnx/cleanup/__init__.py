"""Passes on the ONNX graph, none of which reads a weight.

Each file holds one idea, `onnx_ir` `InPlacePass`es with an honest `modified`. `CLEANUP` is read
from top to bottom.

Passes that onnx_ir 1.1.0 or onnxscript 0.7.2 has too, and why theirs do not serve:

- ShareConstants: `DeduplicateInitializersPass` reads weights, and to
  `CommonSubexpressionEliminationPass` a number and the tensor of it are two values.
- InferDtypes: `ShapeInferencePass` serializes the model (170 ms for 30 layers, here 2) and refuses
  whole graphs over one dtype.
- LowerCastLike: `fold_constants` stores every cast of a constant anew, so equal nodes stay two.
- LowerSplitSequences: `fold_constants` without folding does it, under other names of values: the
  bytes of most exports would change.
- RemoveNoOps and MergeReshapes: the rules know fixed sizes and one dynamic dimension, not two.
- FuseSkipNorms: the rules leave norms without bias and biases of products.
- FuseBiasGelu: the rule takes any vector for the bias and does not know FastGelu.
- ForgetTraces: `ClearMetadataAndDocStringPass` leaves values and shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from bone_fx.errors import PassError
from bone_fx.onnx.cleanup.absorb_casts import AbsorbCasts
from bone_fx.onnx.cleanup.absorb_concats import AbsorbConcats
from bone_fx.onnx.cleanup.absorb_groups import AbsorbGroups
from bone_fx.onnx.cleanup.absorb_regroups import AbsorbRegroups
from bone_fx.onnx.cleanup.absorb_transposes import AbsorbTransposes
from bone_fx.onnx.cleanup.forget_traces import ForgetTraces
from bone_fx.onnx.cleanup.fuse_bias_gelu import FuseBiasGelu
from bone_fx.onnx.cleanup.fuse_skip_norms import FuseSkipNorms
from bone_fx.onnx.cleanup.infer_dtypes import InferDtypes
from bone_fx.onnx.cleanup.lower_cast_like import LowerCastLike
from bone_fx.onnx.cleanup.lower_split_sequences import LowerSplitSequences
from bone_fx.onnx.cleanup.merge_reshapes import MergeReshapes, MergeTransposes
from bone_fx.onnx.cleanup.remove_no_ops import RemoveNoOps
from bone_fx.onnx.cleanup.share_constants import ShareConstants

CLEANUP: tuple[Callable[[], ir.passes.InPlacePass], ...] = (
    common.InlinePass,  # first: the passes below look at the main graph only
    ShareConstants,  # before everything that asks whether an input is constant
    common.IdentityEliminationPass,
    InferDtypes,  # before the two that need the dtype of inner values
    LowerCastLike,
    LowerSplitSequences,
    RemoveNoOps,
    AbsorbCasts,  # before transposes: a weight may be cast and then transposed
    AbsorbGroups,
    AbsorbRegroups,  # before concatenations and transposes: of a weight as the model holds it
    AbsorbConcats,  # between the two: cast, concatenated, transposed
    AbsorbTransposes,
    MergeTransposes,  # before reshapes: pairs of transposes stand between pairs of reshapes
    common.IdentityEliminationPass,
    MergeReshapes,
    common.RemoveUnusedNodesPass,
    common.CommonSubexpressionEliminationPass,
    FuseSkipNorms,  # only if asked for
    FuseBiasGelu,
    common.RemoveUnusedFunctionsPass,
    common.RemoveUnusedOpsetsPass,
    ForgetTraces,  # last: the passes above need the shapes that it drops
)


def clean(model: ir.Model, *, skip_norms: bool = False) -> bool:
    """Runs `CLEANUP` on a model in place; returns whether anything changed.

    Args:
        model: The model.
        skip_norms: Whether to join residual additions and layer norms. ONNX Runtime's kernel for
            the CPU takes twice as long as the operators that it replaces (1.31, MiniLM 8 x 128: 24
            against 11 ms of 200), so this is for CUDA.

    Raises:
        PassError: A pass failed.
    """
    modified = False
    done: list[str] = []
    for create in CLEANUP:
        if create is FuseSkipNorms and not skip_norms:
            continue
        step = create()
        name = type(step).__name__
        try:
            modified = bool(step(model).modified) or modified
        except Exception as error:
            raise PassError(
                f"ONNX cleanup pass {name} failed: {error}",
                found=f"passes before it: {', '.join(done)}",
            ) from error
        done.append(name)
    return modified
