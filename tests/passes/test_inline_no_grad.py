"""Regions under `torch.no_grad()` go in line where nothing in them could need a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bone_fx.passes.frame import Frame
from bone_fx.passes.inline_no_grad import inline_no_grad

REGION = torch.ops.higher_order.wrap_with_set_grad_enabled


class Region(nn.Module):
    """Two values of a region that reads positions and a buffer, a parameter, or an input."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads = reads
        self.register_buffer("rates", torch.linspace(0.1, 1, 4))
        self.weight = nn.Parameter(torch.linspace(1, 2, 4))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        factor = {"buffer": self.rates, "parameter": self.weight, "input": x}[self.reads]
        with torch.no_grad():
            phases = positions.unsqueeze(-1) * factor
            cos, sin = phases.cos(), phases.sin()
        return x * cos + self.weight * sin


def arguments() -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    return x.requires_grad_(), torch.arange(3)


@pytest.mark.parametrize(("reads", "inlined"), [("buffer", 1), ("parameter", 0), ("input", 0)])
def test_what_needs_no_gradient_goes_in_line(reads: str, inlined: int) -> None:
    module = Region(reads)
    gm = torch.export.export(module, arguments()).module()
    assert isinstance(gm, torch.fx.GraphModule)
    assert Frame(gm).run(inline_no_grad).modified == bool(inlined)
    assert not Frame(gm).run(inline_no_grad).modified
    gm.graph.lint()
    gm.recompile()
    assert len(gm.graph.find_nodes(op="call_function", target=REGION)) == 1 - inlined
    x, positions = arguments()
    expected = module(x, positions)
    found = gm(x, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.sum().backward()
    expected_x, positions = arguments()
    module(expected_x, positions).sum().backward()
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=0, atol=0)
