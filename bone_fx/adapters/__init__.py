"""The algebra of adapters: tensors in, tensors out, one file a method.

`METHODS` is the literal table of what this package can fold, `TRAINED` names those that it trains.
Adding a method is one file and one row.
"""

from __future__ import annotations

from bone_fx.adapters import bat, bone, dora, lora, mini
from bone_fx.adapters.lora import LowRank
from bone_fx.adapters.method import Block, Method

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
        grain=bat.grain,
    ),
    "lora": Method(
        "lora",
        additive=True,
        fold=lora.fold,
        fold_=lora.fold_,
        delta=lora.delta,
        part=LowRank.part,
        delta_squares=lora.delta_squares,
    ),
    "dora": Method(
        "dora",
        additive=False,
        fold=dora.fold,
        fold_=dora.fold_,
        delta=dora.delta,
        part=LowRank.part,
    ),
}

TRAINED = ("bone", "mini", "bat")
"""The methods that this package trains; the others come from PEFT."""

__all__ = ["METHODS", "TRAINED", "Block", "LowRank", "Method"]
