"""Sizes in configurations: missing ones are missing, and what is no size is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bone_fx.capture.decoder.interface import shapes_from
from bone_fx.capture.trace.config_sizes import size_in
from bone_fx.capture.trace.default_inputs import default_inputs
from bone_fx.errors import CaptureError


class Pictures(torch.nn.Module):
    """A stand-in for a vision model: all that is read of one is its configuration."""

    main_input_name = "pixel_values"

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**fields)


@pytest.mark.parametrize("value", [None, 0, -1])
def test_a_field_that_states_no_size_is_passed_over(value: int | None) -> None:
    config = SimpleNamespace(n_positions=value, longest=40.0)
    assert size_in(config, "n_positions") is None
    assert size_in(config, "missing", "n_positions", "longest") == 40


@pytest.mark.parametrize("value", ["2048", [8, 8], {"a": 1}, True, 7.5, float("inf"), float("nan")])
def test_a_field_that_holds_no_size_is_refused_by_name(value: Any) -> None:
    with pytest.raises(CaptureError, match="n_positions of SimpleNamespace is no size"):
        size_in(SimpleNamespace(n_positions=value), "n_positions")


def test_shapes_of_a_cache() -> None:
    fields: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 6, "hidden_size": 48}
    assert shapes_from(SimpleNamespace(**fields)) == [(6, 8, 8)] * 2
    fields |= {"head_dim": None, "num_key_value_heads": None}
    assert shapes_from(SimpleNamespace(**fields)) == [(6, 8, 8)] * 2
    assert shapes_from(SimpleNamespace(**fields | {"head_dim": 5})) == [(6, 5, 5)] * 2
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        with pytest.raises(CaptureError, match="how many layers"):
            shapes_from(SimpleNamespace(**fields | {field: None}))
    with pytest.raises(CaptureError, match="num_key_value_heads"):
        shapes_from(SimpleNamespace(**fields | {"num_key_value_heads": [2, 3]}))


@pytest.mark.parametrize(
    ("image_size", "expected"),
    [
        (None, (224, 224)),
        (30, (30, 30)),
        ([4, 20, 30], (20, 30)),
        ({"height": 8, "width": 9}, (8, 9)),
    ],
)
def test_pictures(image_size: Any, expected: tuple[int, int]) -> None:
    model = Pictures(image_size=image_size, num_channels=None, vision_config=None)
    assert default_inputs(model)["pixel_values"].shape == (2, 3, *expected)
