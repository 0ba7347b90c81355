"""Graph to graph: one pass a file, each held to the contract in `frame`."""

from __future__ import annotations

from bone_fx.passes.fold import fold_adapters, fold_weight
from bone_fx.passes.frame import PassResult
from bone_fx.passes.insert import insert_adapters

__all__ = ["PassResult", "fold_adapters", "fold_weight", "insert_adapters"]
