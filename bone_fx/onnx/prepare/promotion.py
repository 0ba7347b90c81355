"""Type promotion made explicit, where operands of different dtypes meet."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node


def insert_promotions(graph_module: GraphModule) -> None:
    """Lets torch's own pass insert conversions, if any operator of the graph mixes dtypes.

    Before: `aten.mul(x_f16, y_f32)`
    After:  `aten.mul(prims.convert_element_type(x_f16, float32), y_f32)`
    """
    if not any(map(_may_promote, graph_module.graph.nodes)):
        return
    from torch.onnx._internal.fx.passes.type_promotion import InsertTypePromotion

    InsertTypePromotion(graph_module).run()


def _may_promote(node: Node) -> bool:
    """Whether an elementwise operator's operands may change dtype; a wrong yes costs time only."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    result = node.meta.get("val")
    if not isinstance(result, Tensor) or torch.Tag.pointwise not in node.target.tags:
        return False
    if node.target is torch.ops.prims.convert_element_type.default:
        return False
    operands = [arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, Node)]
    dtypes = {
        value.dtype for value in (a.meta.get("val") for a in operands) if isinstance(value, Tensor)
    }
    dtypes -= {torch.bool} if node.target._schema.name == "aten::where" else set()
    if len(dtypes) > 1:
        return True
    if any(isinstance(a.meta.get("val"), (torch.SymInt, torch.SymFloat)) for a in operands):
        return True
    numbers = [arg for arg in node.args if isinstance(arg, (float, torch.SymFloat))]
    (dtype,) = dtypes or {result.dtype}
    to_float = bool(numbers) or result.dtype not in (dtype, torch.bool)
    return to_float and not dtype.is_floating_point
