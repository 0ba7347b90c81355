"""DoRA: LoRA, and then a length of its own for each row of the weight (PEFT's `use_dora`).

`V = W + s B A`, and `W'[o] = m[o] V[o] / ‖V[o]‖`. It acts on the weight that it is given, and needs
whole rows of it. (arXiv 2402.09353.)

Shapes: I in_features, O out_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bone_fx.adapters import lora
from bone_fx.adapters.lora import LowRank


def fold(w_OI: Tensor, block: LowRank) -> Tensor:
    """The folded weight `[O, I]`, a new tensor."""
    v_OI = lora.fold(w_OI, block)
    return v_OI.mul_(_factors(v_OI, block))


def fold_(w_OI: Tensor, block: LowRank) -> Tensor:
    """The same in place of a contiguous weight."""
    v_OI = lora.fold_(w_OI, block)
    return v_OI.mul_(_factors(v_OI, block))


def delta(w_OI: Tensor, block: LowRank) -> Tensor:
    """`W' - W`, `[O, I]`: it depends on the weight that DoRA is given."""
    return fold(w_OI, block).sub_(w_OI)


def _factors(v_OI: Tensor, block: LowRank) -> Tensor:
    """`m / ‖V‖`, `[O, 1]`; lengths in float64, so that they do not hang on the order of a sum."""
    assert block.magnitude is not None
    length_O: Tensor = torch.linalg.vector_norm(v_OI, dim=1, dtype=torch.float64)
    return (block.magnitude.double() / length_O).to(v_OI.dtype).unsqueeze(1)
