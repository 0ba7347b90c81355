"""The lowering passes in the order in which they run."""

from __future__ import annotations

from bone_fx.lower.absorb_routing import absorb_routing
from bone_fx.lower.cancel_reshapes import cancel_reshapes
from bone_fx.lower.find_linears import find_linears
from bone_fx.lower.flatten_products import flatten_products
from bone_fx.lower.functionalize import functionalize, no_mutable_operators
from bone_fx.lower.fuse_norms import fuse_norms
from bone_fx.lower.heads.absorb_rotary import absorb_rotary
from bone_fx.lower.heads.absorb_scale import absorb_scale
from bone_fx.lower.heads.flatten_rotary import flatten_rotary
from bone_fx.lower.heads.move_norms import move_norms
from bone_fx.lower.heads.order_heads import order_heads
from bone_fx.lower.heads.pack_projections import pack_projections
from bone_fx.lower.keep_tokens import keep_tokens
from bone_fx.lower.stamp import every_layer_written
from bone_fx.passes.frame import Keeps, Row

BITS, LAST_BIT, MATHEMATICS = Keeps.BITS, Keeps.LAST_BIT, Keeps.MATHEMATICS
_CANCEL = Row(
    cancel_reshapes,
    BITS,
    "after what looks for reshapes and transpositions, before what looks through them",
    requires=(no_mutable_operators,),
)

# What tightens a layer: it sees one of each kind of layer.
LAYER_PASSES: tuple[Row, ...] = (
    Row(functionalize, BITS, "first: cancel_reshapes requires that no operator changes a tensor"),
    Row(find_linears, LAST_BIT, "before what looks for linear layers"),
    Row(absorb_rotary, LAST_BIT, "before the transpositions that it looks for are cancelled"),
    Row(order_heads, LAST_BIT, "its pieces are heads until the reshapes around them go"),
    Row(move_norms, BITS, "before the transpositions that it moves are cancelled"),
    Row(flatten_rotary, BITS, "after absorb_rotary: it rewrites what that leaves"),
    Row(absorb_routing, MATHEMATICS),
    Row(flatten_products, LAST_BIT, "before keep_tokens, which knows linear layers"),
    Row(keep_tokens, LAST_BIT, "before the views that it makes idle are cancelled"),
    _CANCEL,
    Row(absorb_scale, LAST_BIT, "looks for a product right before the operator"),
    Row(pack_projections, LAST_BIT, "sees attention right behind its projections"),
)

# What works across layers: it sees every layer.
PASSES: tuple[Row, ...] = (
    _CANCEL,
    Row(
        fuse_norms,
        LAST_BIT,
        "a residual addition ends a layer, and the norm of the sum starts the next",
        requires=(every_layer_written,),
    ),
)
