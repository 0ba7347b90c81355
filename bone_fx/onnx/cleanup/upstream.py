"""onnxscript's rewrites as passes."""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewritePass
from onnxscript.rewriter.rules.common import transpose_transpose_rule


class LowerSequences(ir.passes.InPlacePass):
    """onnxscript's symbolic evaluation, which reads no float and folds no node of constants.

    Before: `s = SplitToSequence(x [b, 12], 4)`, `y = SequenceAt(s, 0)`, `z = SequenceAt(s, 2)`
    After:  `y, _, z = Split(x, num_outputs=3)`; sequences have no CUDA kernel

    It also drops what symbolic shapes show to change nothing.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Leaves sequences without users, and the parts behind Identity nodes."""
        result = fold_constants(model, should_fold=lambda node: False)
        return ir.passes.PassResult(model, bool(result.modified))


class MergeTransposes(RewritePass):
    """onnxscript's rule for a transpose of a transpose: one, or Identity."""

    def __init__(self) -> None:
        super().__init__([transpose_transpose_rule])
