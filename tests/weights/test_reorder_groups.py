"""Rows of a weight by part: the whole, any part of it, and back."""

from __future__ import annotations

import pytest
import torch

from bone_fx.onnx.packed_names import by_part_name, groups_of, parts_of
from bone_fx.weights.recipes.recipe import Converted, Recipe, Transpose, Value
from bone_fx.weights.recipes.reorder import Ungroup, row_order

W = torch.arange(3 * 7 * 4.0).reshape(21, 4)
WIDTHS = (4, 1, 2)


def expected() -> torch.Tensor:
    rows = [g * 7 + r for part in ((0, 4), (4, 5), (5, 7)) for g in range(3) for r in range(*part)]
    return W[rows]


@pytest.mark.parametrize(
    "source",
    [Value(W), Transpose(Value(W.t())), Converted((Value(W),), lambda w: w[0], (21, 4), "same")],
)
def test_rows_are_put_part_by_part(source: Recipe) -> None:
    recipe = Ungroup(source, 3, WIDTHS)
    assert torch.equal(recipe.evaluate(), expected())
    assert recipe.shape == (21, 4)
    for start, stop in ((0, 21), (3, 14), (13, 14), (20, 21)):
        part = recipe.part(((start, stop), (1, 3)))
        assert torch.equal(part, expected()[start:stop, 1:3])
    assert recipe.describe().endswith("3 groups of [4, 1, 2] apart")


def test_a_bias() -> None:
    bias = torch.arange(21.0)
    assert torch.equal(Ungroup(Value(bias), 3, WIDTHS).evaluate(), bias[row_order(3, WIDTHS)])


def test_the_order_leads_back() -> None:
    assert torch.equal(expected()[torch.argsort(row_order(3, WIDTHS))], W)


def test_groups_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="4 groups"):
        Ungroup(Value(W), 4, WIDTHS)


def test_the_name_says_the_order() -> None:
    name = by_part_name("layers.0.qkv.weight", 3, WIDTHS)
    assert name == "layers.0.qkv.weight.by_part_3_4_1_2"
    assert groups_of(name) == (3, WIDTHS)
    assert parts_of(name) == ["layers.0.qkv.weight"]
    assert groups_of("layers.0.qkv.weight") is None
