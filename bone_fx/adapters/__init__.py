"""The algebra of block adapters: tensors in, tensors out, one file a method.

`METHODS` is the literal table of what this package can train and fold. Adding a method is one file
and one row.
"""

from __future__ import annotations

from bone_fx.adapters import bat, bone, mini
from bone_fx.adapters.method import Method

METHODS: dict[str, Method] = {
    "bone": Method(
        "bone",
        additive=True,
        block_shape=bone.block_shape,
        refusal=bone.refusal,
        fold=bone.fold,
        fold_=bone.fold_,
        term=bone.term,
        delta=bone.delta,
        part=bone.part,
        delta_squares=bone.delta_squares,
    ),
    "mini": Method(
        "mini",
        additive=True,
        block_shape=mini.block_shape,
        refusal=mini.refusal,
        fold=mini.fold,
        fold_=mini.fold_,
        term=mini.term,
        delta=mini.delta,
        part=mini.part,
        delta_squares=bone.delta_squares,  # a part of a mini block is a Bone block
    ),
    "bat": Method(
        "bat",
        additive=False,
        block_shape=bat.block_shape,
        refusal=bat.refusal,
        fold=bat.fold,
        fold_=bat.fold_,
        term=None,
        delta=bat.delta,
        part=bat.part,
    ),
}

__all__ = ["METHODS", "Method"]
