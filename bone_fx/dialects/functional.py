"""`torch.nn.functional.linear` on a parameter, as `torch.fx.symbolic_trace` records it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.nn import functional

from bone_fx.dialects.linear_use import LinearUse, module_type, owner_of
from bone_fx.dialects.parameter_source import is_bias, weight_behind
from bone_fx.sites import LinearSite

_TARGETS = {functional.linear, torch._C._nn.linear}


def read(gm: fx.GraphModule, node: fx.Node) -> LinearUse | None:
    """The linear use at a call of `F.linear`, or None."""
    if node.op != "call_function" or node.target not in _TARGETS:
        return None
    names = ("input", "weight", "bias")
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    x, bias = arguments.get("input"), arguments.get("bias")
    source = weight_behind(gm, arguments.get("weight"))
    if source is None or not isinstance(x, fx.Node) or not is_bias(gm, bias, unknown=True):
        return None
    weight_name, weight, flipped = source
    out_features, in_features = weight.shape[::-1] if flipped else weight.shape
    name = owner_of(weight_name)
    site = LinearSite(
        name, weight_name, in_features, out_features, flipped, module_type(node, name)
    )
    return LinearUse(node, site, x, bias, "functional")
