"""The nodes that this package puts into training graphs (`torch.library`, namespace `bone_fx`).

All are composite: autograd, autocast, FakeTensor and `torch.compile` see the products they are made
of, and inductor is free to fuse them. Where autograd would keep more than it must, the composite
calls an autograd function that keeps less and recomputes the rest in backward.
"""

from bone_fx.operators.adapted_linear import ADAPTED_LINEAR
from bone_fx.operators.adapted_linears import ADAPTED_LINEARS
from bone_fx.operators.gate_product import ACTIVATIONS, GATE_PRODUCT
from bone_fx.operators.joint_linear import JOINED_METHODS, KEEP_SUMS
from bone_fx.operators.loss.head import HEAD, HeadInputs, head_inputs
from bone_fx.operators.loss.linear_cross_entropy import linear_cross_entropy
from bone_fx.operators.masked_attention import ATTENTION, forget_masks
from bone_fx.operators.rms_norm import RMS_NORM
from bone_fx.operators.rotary_embedding import ROTARY

__all__ = [
    "ACTIVATIONS",
    "ADAPTED_LINEAR",
    "ADAPTED_LINEARS",
    "ATTENTION",
    "GATE_PRODUCT",
    "HEAD",
    "JOINED_METHODS",
    "KEEP_SUMS",
    "RMS_NORM",
    "ROTARY",
    "HeadInputs",
    "forget_masks",
    "head_inputs",
    "linear_cross_entropy",
]
