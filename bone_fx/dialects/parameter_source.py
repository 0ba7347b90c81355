"""Follow an argument back to the parameter it reads, through the views that only transpose it."""

from __future__ import annotations

import torch
from torch import fx

from bone_fx.graphs import attribute_at

_TRANSPOSES = {
    torch.ops.aten.t.default,
    torch.ops.aten.numpy_T.default,
    torch.t,
}
_SWAPS = {torch.ops.aten.transpose.int, torch.transpose, "transpose"}
_PERMUTES = {torch.ops.aten.permute.default, torch.permute, "permute"}


def weight_behind(gm: fx.GraphModule, argument: object) -> tuple[str, torch.Tensor, bool] | None:
    """The 2-D parameter an argument reads.

    Its dotted name, the parameter, and whether it arrives transposed; None if none.
    """
    flipped = False
    while isinstance(argument, fx.Node) and _is_transpose(argument):
        flipped = not flipped
        argument = argument.args[0]
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    name = str(argument.target)
    tensor = attribute_at(gm, name)
    if not isinstance(tensor, torch.nn.Parameter) or tensor.dim() != 2:
        return None
    return name, tensor, flipped


def is_bias(gm: fx.GraphModule, argument: object, *, unknown: bool) -> bool:
    """Whether an argument is a bias: nothing, or a vector.

    Args:
        gm: The graph.
        argument: The argument of a linear layer's node.
        unknown: The answer for a value whose shape the trace did not write down.
    """
    if not isinstance(argument, fx.Node):
        return argument is None
    value = argument.meta.get("val")
    if argument.op == "get_attr":
        value = attribute_at(gm, str(argument.target))
    return value.dim() == 1 if isinstance(value, torch.Tensor) else unknown


def _is_transpose(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "T"
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target in _TRANSPOSES or (node.op == "call_method" and node.target == "t"):
        return True
    dims = [int(a) for a in node.args[1:] if isinstance(a, int)]
    if node.target in _SWAPS:
        return sorted(d % 2 for d in dims) == [0, 1]
    if node.target in _PERMUTES:
        order = (
            node.args[1] if len(node.args) > 1 and isinstance(node.args[1], list | tuple) else dims
        )
        return list(order) == [1, 0]
    return False
