"""`aten.linear`, `addmm`, `mm` and `matmul` on a parameter, as `torch.export` records them.

Torch's Python functions of the same names, as `torch.fx.symbolic_trace` records them.

`addmm` and `matmul` on the stored weight take it as `[I, O]` (HF `Conv1D`); on a transposed view of
it, as `[O, I]`. What `addmm` adds is a bias only if it is a vector: it may as well be a residual.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from bone_fx.dialects.linear_use import LinearUse, module_type, owner_of
from bone_fx.dialects.parameter_source import is_bias, weight_behind
from bone_fx.sites import LinearSite

aten = torch.ops.aten
_ADDMM = {aten.addmm.default, torch.addmm}
_PRODUCTS = {aten.mm.default, aten.matmul.default, torch.matmul, torch.mm, operator.matmul}


def read(gm: fx.GraphModule, node: fx.Node) -> LinearUse | None:
    """The linear use at an aten node, or None."""
    if node.op == "call_method" and node.target in ("matmul", "mm") and len(node.args) == 2:
        return _use(gm, node, node.args[0], node.args[1], None, is_IO=True)
    if node.op != "call_function":
        return None
    if node.target is aten.linear.default:
        bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
        return _use(gm, node, node.args[0], node.args[1], bias, is_IO=False)
    if node.target in _ADDMM and not node.kwargs and len(node.args) == 3:
        return _use(gm, node, node.args[1], node.args[2], node.args[0], is_IO=True)
    if node.target in _PRODUCTS and len(node.args) == 2:
        return _use(gm, node, node.args[0], node.args[1], None, is_IO=True)
    return None


def _use(
    gm: fx.GraphModule, node: fx.Node, x: object, weight: object, bias: Any, *, is_IO: bool
) -> LinearUse | None:
    source = weight_behind(gm, weight)
    if (
        source is None
        or not isinstance(x, fx.Node)
        or not is_bias(gm, bias, unknown=node.target not in _ADDMM)
    ):
        return None
    weight_name, tensor, flipped = source
    transposed = is_IO != flipped
    out_features, in_features = tensor.shape[::-1] if transposed else tensor.shape
    name = owner_of(weight_name)
    site = LinearSite(
        name, weight_name, in_features, out_features, transposed, module_type(node, name)
    )
    family = "aten" if isinstance(node.target, torch._ops.OpOverload) else "functional"
    return LinearUse(node, site, x, bias, family)
