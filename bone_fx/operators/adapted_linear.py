"""`bone_fx::adapted_linear`: the one node a site has in an adapted graph.

One block of Bone or BAT is computed by `joint_linear`, which says what it keeps; more of them, MiSS
mini and dropout on an adapter's branch are written as products.

Shapes: T tokens (any leading dimensions), I in_features, O out_features, R block size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bone_fx.adapters import METHODS
from bone_fx.operators.joint_linear import JOINED_METHODS, joint_linear
from bone_fx.operators.library import register


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: list[Tensor],
    methods: list[str],
    block_inputs: list[Tensor],
    transposed: bool = False,
    recompute: bool = True,
) -> Tensor:
    """A linear layer under a list of block adapters, applied in the order of the list.

    Args:
        x: Input `[..., I]`.
        weight: Base weight, `[O, I]`, or `[I, O]` if `transposed` (HF `Conv1D`, `addmm`).
        bias: Base bias `[O]` or None.
        blocks: One block an adapter, shaped as its method says; usually float32, whatever the
            weight's dtype.
        methods: The method of each block, a key of `bone_fx.adapters.METHODS`.
        block_inputs: Empty, or for each block the input it sees instead of `x` (dropout on the
            adapter's branch, as `miss_dropout` in PEFT 0.18.1). A block that a later BAT acts upon
            works on the weight and ignores it.
        transposed: Whether `weight` is `[I, O]`.
        recompute: Whether backward folds a BAT block's weight again, instead of keeping it.

    Returns:
        `[..., O]` in x's dtype, under autocast too. Rounding follows PEFT 0.18.1: the branch is
        computed in the block's dtype and the sum is cast back once.
    """
    w_OI = weight.t() if transposed else weight
    if len(blocks) == 1 and methods[0] in JOINED_METHODS and not block_inputs:
        return joint_linear(x, [w_OI], [bias], blocks, methods, recompute=recompute)[0]
    last = max((i for i, name in enumerate(methods) if not METHODS[name].additive), default=-1)
    if last < 0:
        y = _base_product(x, weight, bias, transposed)
    else:
        for block, name in zip(blocks[:last], methods[:last], strict=True):
            w_OI = METHODS[name].fold(w_OI.to(block.dtype), block)
        block, method = blocks[last], methods[last]
        y = joint_linear(x, [w_OI], [bias], [block], [method], recompute=recompute)[0]
    for i in range(last + 1, len(blocks)):
        term = METHODS[methods[i]].term
        if term is None:
            raise AssertionError(f"{methods[i]} after the last method that acts on the weight")
        source = block_inputs[i] if block_inputs else x
        y = y + term(source.to(blocks[i].dtype), blocks[i], w_OI.shape[0])
    return y.to(x.dtype)


def _base_product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    if not transposed:
        return functional.linear(x, weight, bias)
    if bias is None:
        return x @ weight
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(
        *x.shape[:-1], weight.shape[1]
    )


ADAPTED_LINEAR = register(
    "adapted_linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] blocks, str[] methods, "
    "Tensor[] block_inputs, bool transposed=False, bool recompute=True) -> Tensor",
    adapted_linear,
)
"""The operator as it stands in graphs: `torch.ops.bone_fx.adapted_linear.default`."""
