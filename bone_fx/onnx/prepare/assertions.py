"""Checks that a traced graph makes on its own tensors; an ONNX graph has no node for them."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

_CHECKS = frozenset(
    {
        "_guards_fn",
        torch.ops.aten._assert_async.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


def remove_assertions(graph_module: GraphModule) -> None:
    """Erases assertion nodes and what only they used.

    Before: `_assert_scalar(ge(sym_size, 2), "...")`
    After:  nothing
    """
    for node in reversed(graph_module.graph.nodes):
        if node.op in ("call_function", "call_module") and node.target in _CHECKS:
            graph_module.graph.erase_node(node)
