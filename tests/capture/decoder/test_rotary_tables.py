"""Tables of rotary embeddings are constants of the graph, in the dtype of its operators."""

from __future__ import annotations

import pytest
import torch

from bone_fx.capture.decoder.rotary.tables import Layout, tables_of


def in_float32(positions_M: torch.Tensor, _: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a module that turns heads in float32 whatever the model's dtype, as OLMo-2's does."""
    angles = torch.outer(positions_M.float(), torch.tensor([1.0, 0.1, 0.01]))
    both = torch.cat((angles, angles), dim=-1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["halves", "whole"])
def test_angles_are_in_the_dtype_of_the_graph(dtype: torch.dtype, layout: Layout) -> None:
    tables = tables_of(in_float32, 50, dtype, torch.nn.Identity())
    cos, sin = tables.angles(layout)
    expected = torch.outer(torch.arange(50.0), torch.tensor([1.0, 0.1, 0.01])).cos().to(dtype)
    assert cos.dtype == sin.dtype == dtype
    assert torch.equal(cos[:, :3], expected)


def test_a_module_that_is_traced_gets_what_it_makes() -> None:
    cos, _ = tables_of(in_float32, 50, torch.float16, torch.nn.Identity()).as_made()
    assert cos.dtype == torch.float32
