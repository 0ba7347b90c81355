"""Fuses a residual addition with the norm of its sum.

Before:
    sum:    [B, S, W] = add(a, b)
    normed: [B, S, W] = SimplifiedLayerNormalization(sum, scale)       or layer_norm(sum, …)
    (other readers of sum)

After:
    normed, _, _, sum = com.microsoft::SkipSimplifiedLayerNormalization(a, b, scale)
                                                 or com.microsoft::SkipLayerNormalization

Of several norms of one sum the first is fused. The addition stays where its sides have different
shapes, where it scales one of them, and where something reads the sum before the norm.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from bone_fx.lower.cancel_reshapes import same_shape
from bone_fx.lower.symbolic import CONTRIB, attributes, insert_operator, is_operator, operands
from bone_fx.passes.frame import Outcome

aten = torch.ops.aten

NORMED, SUM = 0, 3


def fuse_norms(graph: Graph) -> Outcome:
    """Replaces additions and norms by ONNX Runtime's skip-norm operators."""
    changed = sum(_fuse(graph, node) for node in list(graph.nodes))
    return Outcome(modified=changed > 0)


def _fuse(graph: Graph, norm: Node) -> bool:
    fused = _operator_for(norm)
    if fused is None:
        return False
    op_type, total, weights, epsilon = fused
    if not _is_plain_addition(total) or any(user < norm for user in total.users):
        return False
    left, right = total.args[:2]
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    value: Tensor = total.meta["val"]
    statistic = value.new_empty((*value.shape[:-1], 1), dtype=torch.float32)
    with graph.inserting_before(norm):
        node = insert_operator(
            graph,
            op_type,
            [left, right, *weights],
            {"epsilon": epsilon},
            (value, statistic, statistic, value),
            sizes_of=left,
            domain=CONTRIB,
        )
        outputs = {}
        for place in (NORMED, SUM):
            outputs[place] = graph.call_function(operator.getitem, (node, place))
            outputs[place].meta = {**total.meta, "val": node.meta["val"][place]}
    node.meta = {**norm.meta, "val": node.meta["val"]}
    norm.replace_all_uses_with(outputs[NORMED])
    graph.erase_node(norm)
    total.replace_all_uses_with(outputs[SUM])
    graph.erase_node(total)
    if not outputs[SUM].users:
        graph.erase_node(outputs[SUM])
    return True


def _operator_for(norm: Node) -> tuple[str, Node, list[Node], float] | None:
    """The fused operator, what the norm reads, its weights and epsilon; None if it is no norm."""
    if is_operator(norm, "", "SimplifiedLayerNormalization"):
        source, scale = operands(norm)
        values: Mapping[str, Any] = attributes(norm)
        if source is None or scale is None or values.get("axis") != -1:
            return None
        return "SkipSimplifiedLayerNormalization", source, [scale], values["epsilon"]
    if norm.target is aten.layer_norm.default:
        normed, shape, gamma, beta, epsilon = (*norm.args, None, None, None)[:5]
        if not isinstance(shape, list | tuple) or len(shape) != 1 or not isinstance(gamma, Node):
            return None
        assert isinstance(normed, Node)
        weights = [gamma, beta] if isinstance(beta, Node) else [gamma]
        return "SkipLayerNormalization", normed, weights, float(epsilon or 1e-5)  # type: ignore[arg-type]
    return None


def _is_plain_addition(node: Node) -> bool:
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    left, right = node.args
    if not isinstance(left, Node) or not isinstance(right, Node):
        return False
    value = node.meta["val"]
    same = all(side.meta["val"].dtype == value.dtype for side in (left, right))
    return same and value.dim() == 3 and same_shape(left, right) and same_shape(left, node)
