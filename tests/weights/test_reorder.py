"""A dimension in another order: all of it, and any part."""

from __future__ import annotations

import pytest
import torch

from bone_fx.weights.recipes.recipe import Value
from bone_fx.weights.recipes.reorder import Regrouped


@pytest.mark.parametrize(("dim", "outer", "inner"), [(1, 2, 6), (1, 4, 3), (1, 2, 3), (0, 3, 1)])
def test_parts_are_parts_of_the_whole(dim: int, outer: int, inner: int) -> None:
    tensor = torch.randn(3, 12, 5)
    recipe = Regrouped(Value(tensor), dim, outer, inner)
    shape = (*tensor.shape[:dim], outer, inner, -1, *tensor.shape[dim + 1 :])
    expected = tensor.view(shape).transpose(dim, dim + 1).reshape(tensor.shape)
    assert torch.equal(recipe.evaluate(), expected)
    part = recipe.part(((1, 3), (2, 9), (0, 4)))
    assert torch.equal(part, expected[1:3, 2:9, :4])
    assert not recipe.cuts(dim)
    assert recipe.cuts(2)


def test_gates_and_ups_in_turns() -> None:
    gates, ups = torch.zeros(1, 4, 2), torch.ones(1, 4, 2)
    recipe = Regrouped(Value(torch.cat((gates, ups), 1)), 1, 2, 4)
    assert recipe.evaluate()[0, :, 0].tolist() == [0, 1] * 4
    assert recipe.describe().endswith("-> regroup 2 x 4 of dim 1")


def test_a_dimension_without_such_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="has no groups of 2 x 4"):
        Regrouped(Value(torch.zeros(3, 12)), 1, 2, 4)
