"""Sizes of a call: which decisions of the model are held, and which the tracer made by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bone_fx.capture.call.conditions import Conditions
from bone_fx.capture.training.capture_training import capture_training
from bone_fx.errors import InputRefusedError

LENGTH = "L['x'].size()[1]"
BOTH = f"L['x'].size()[0]*{LENGTH}"
DYNAMIC = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)


@pytest.mark.parametrize(
    "text",
    [
        f"{LENGTH} != 1",
        f"{LENGTH} >= 2",
        f"2 <= {LENGTH}",
        f"1 < {LENGTH}",
        f"-1 + {LENGTH} != 0",
        f"{BOTH} > 1",
        f"{BOTH} != {LENGTH}",
    ],
)
def test_what_only_says_that_a_size_is_not_one_lets_ones_pass(text: str) -> None:
    Conditions((text,)).require({"x": torch.ones(1, 1)})


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (f"{LENGTH} >= 64", (1, 32)),
        (f"64 <= {LENGTH}", (1, 32)),
        (f"{LENGTH} != 7", (1, 7)),
        (f"{BOTH} != 30", (1, 30)),
        (f"({LENGTH} % 3) != 1", (1, 4)),
        (f"{LENGTH} >= 3", (2, 1)),
        (f"2 <= {LENGTH} and {LENGTH} != 9", (1, 9)),
        (f"max(8, {LENGTH}) != 8", (1, 5)),
    ],
)
def test_what_says_more_is_held_in_calls_with_a_one(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputRefusedError, match="another path"):
        Conditions((text,)).require({"x": torch.ones(shape)})


class _Long(nn.Linear):
    """Another path for long inputs."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[1] >= 12 else 2 * y


@pytest.mark.parametrize(
    "dynamic_shapes", [DYNAMIC, ({0: torch.export.Dim("rows"), 1: torch.export.Dim("l", min=12)},)]
)
def test_one_row_of_a_length_beyond_the_branch_is_refused(dynamic_shapes: Any) -> None:
    model = _Long(6, 5)
    capture = capture_training(model, (torch.randn(2, 17, 6),), dynamic_shapes=dynamic_shapes)
    for rows in (1, 3):
        x = torch.randn(rows, 12, 6)
        assert torch.equal(capture(x), model(x))
        with pytest.raises(InputRefusedError, match=">= 12"):
            capture(torch.randn(rows, 11, 6))
