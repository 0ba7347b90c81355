"""The lowering passes in the order in which they run, each with the reason of its place."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from bone_fx.lower.absorb_routing import absorb_routing
from bone_fx.lower.cancel_reshapes import cancel_reshapes
from bone_fx.lower.find_linears import find_linears
from bone_fx.lower.flatten_products import flatten_products
from bone_fx.lower.functionalize import functionalize
from bone_fx.lower.fuse_norms import fuse_norms
from bone_fx.lower.heads.absorb_rotary import absorb_rotary
from bone_fx.lower.heads.absorb_scale import absorb_scale
from bone_fx.lower.heads.cut_columns import cut_columns
from bone_fx.lower.heads.flatten_rotary import flatten_rotary
from bone_fx.lower.heads.join_projections import join_projections
from bone_fx.lower.heads.move_norms import move_norms
from bone_fx.lower.heads.order_heads import order_heads
from bone_fx.lower.heads.pack_projections import pack_projections
from bone_fx.lower.keep_tokens import keep_tokens
from bone_fx.passes.frame import PassResult

PassFunction = Callable[[GraphModule], PassResult]

# What tightens a layer: it sees one of each kind of layer.
LAYER_PASSES: tuple[PassFunction, ...] = (
    functionalize,  # first: several others leave a graph alone that changes tensors
    find_linears,
    cut_columns,
    absorb_rotary,  # early: it looks for the transpositions that the next one cancels
    order_heads,  # its pieces are heads, until the reshapes around them are cancelled
    move_norms,
    flatten_rotary,
    absorb_routing,
    flatten_products,
    keep_tokens,
    cancel_reshapes,
    absorb_scale,  # between the two: it looks for a product right before the operator
    pack_projections,  # sees projections and attention without the reshapes between them
    join_projections,  # what could not be packed
)

# What works across layers: it sees every layer.
PASSES: tuple[PassFunction, ...] = (
    cancel_reshapes,
    fuse_norms,  # a residual addition at the end of a layer, a norm at the start of the next
)
