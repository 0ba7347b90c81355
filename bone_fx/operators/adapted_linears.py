"""`bone_fx::adapted_linears`: the adapted layers that read one x, as they stand in a running graph.

`lean.join_sites` writes it; `joint_linear` says what it keeps.
"""

from __future__ import annotations

from torch import Tensor

from bone_fx.operators.joint_linear import joint_linear
from bone_fx.operators.library import register


def adapted_linears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    blocks: list[Tensor],
    methods: list[str],
    transposed: bool = False,
    recompute: bool = True,
) -> list[Tensor]:
    """Linear layers of one input, each under one block.

    Args:
        x: Input `[..., I]`.
        weights: Base weights, `[O_i, I]`, or `[I, O_i]` if `transposed` (HF `Conv1D`, `addmm`).
        biases: Base biases `[O_i]`, each may be None.
        blocks: One block a layer, shaped as its method says.
        methods: `"bone"` or `"bat"` a layer.
        transposed: Whether the weights are `[I, O_i]`.
        recompute: Whether backward folds BAT's weights again; if not they are kept, one float32
            weight a layer.

    Returns:
        `[..., O_i]` for each layer, in x's dtype, under autocast too.
    """
    oriented = [weight.t() for weight in weights] if transposed else weights
    return joint_linear(x, oriented, biases, blocks, methods, recompute=recompute)


ADAPTED_LINEARS = register(
    "adapted_linears(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] blocks, "
    "str[] methods, bool transposed=False, bool recompute=True) -> Tensor[]",
    adapted_linears,
)
"""The operator as it stands in graphs: `torch.ops.bone_fx.adapted_linears.default`."""
