"""The product that only the output has becomes the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bone_fx.lean.deferred_logits import defer_logits
from bone_fx.lean.form import LAYER, running_form
from bone_fx.operators import HEAD
from tests.framed import modifies

LINEAR = torch.ops.aten.linear.default


class TwoHeads(nn.Module):
    """One product for the output, one that is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.body(x)
        return self.head(hidden), hidden, self.other(hidden).relu()


def test_only_what_the_output_alone_reads_is_the_head() -> None:
    module, x = TwoHeads(), torch.randn(3, 4)
    gm = torch.export.export(module, (x,)).module()
    graph = running_form(gm.graph, LAYER)
    assert modifies(defer_logits, graph)
    kinds = [node.target for node in graph.nodes if node.target in (HEAD, LINEAR)]
    assert sorted(kinds, key=str) == sorted([HEAD, LINEAR, LINEAR], key=str)
    assert not modifies(defer_logits, graph)
    rewritten = torch.fx.GraphModule(gm, graph)
    for ours, theirs in zip(rewritten(x), module(x), strict=True):
        torch.testing.assert_close(ours, theirs)
