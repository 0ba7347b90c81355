"""Our own node, `bone_fx::adapted_linear`: a site that already carries adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from bone_fx.dialects.linear_use import LinearUse
from bone_fx.dialects.parameter_source import weight_behind
from bone_fx.operators import ADAPTED_LINEAR
from bone_fx.sites import LinearSite

META = "bone_fx"
"""Key of `node.meta` that holds `(site, family)` of an adapted node."""


@dataclass(frozen=True)
class AdaptedArguments:
    """The arguments of an adapted node; see `bone_fx.operators.adapted_linear`."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    blocks: list[fx.Node]
    methods: list[str]
    block_inputs: list[fx.Node]
    transposed: bool
    recompute: bool = True

    @classmethod
    def of(cls, node: fx.Node) -> AdaptedArguments:
        """The arguments of a node."""
        x, weight, bias, blocks, methods, inputs, transposed = cast("tuple[Any, ...]", node.args)
        recompute = bool(node.kwargs.get("recompute", True))
        listed = list(blocks), list(methods), list(inputs)
        return cls(x, weight, bias, *listed, transposed, recompute)


def read(gm: fx.GraphModule, node: fx.Node) -> LinearUse | None:
    """The linear use at an adapted node, or None."""
    if node.op != "call_function" or node.target is not ADAPTED_LINEAR:
        return None
    site, family = node.meta.get(META) or _infer(gm, node)
    x, bias = node.args[0], node.args[2]
    if not isinstance(x, fx.Node) or not (bias is None or isinstance(bias, fx.Node)):
        return None
    return LinearUse(node, site, x, bias, family)


def _infer(gm: fx.GraphModule, node: fx.Node) -> tuple[LinearSite, str]:
    """Site and family of a node whose meta was lost, as pickling loses it."""
    source = weight_behind(gm, node.args[1])
    if source is None:
        raise AssertionError(f"{node.name}: the weight of an adapted node is not a parameter")
    name, weight, _ = source
    transposed = bool(node.args[6]) if len(node.args) > 6 else False
    out_features, in_features = weight.shape[::-1] if transposed else weight.shape
    return LinearSite(
        name.removesuffix(".weight"), name, in_features, out_features, transposed
    ), "aten"
