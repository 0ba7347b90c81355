"""What masks of transformers are taken for: causal, one window, or neither."""

from __future__ import annotations

import pytest
import torch
from transformers import masking_utils

from bone_fx.capture.decoder.masks import MaskFunction, recognise_mask
from bone_fx.errors import CaptureError

HORIZONS = (7, 12, 64, 4096)


def chunked(size: int) -> MaskFunction:
    """Transformers' mask of chunks, on one text without padding."""
    mask: MaskFunction = masking_utils.chunked_causal_mask_function(
        size, torch.zeros(1, dtype=torch.long)
    )
    return mask


@pytest.mark.parametrize("horizon", HORIZONS)
def test_causal_masks_and_windows(horizon: int) -> None:
    assert recognise_mask(masking_utils.causal_mask_function, horizon).window is None
    for size in (1, 3, horizon // 2, horizon - 1):
        window = masking_utils.sliding_window_causal_mask_function(size)
        assert recognise_mask(window, horizon).window == size


@pytest.mark.parametrize("horizon", HORIZONS)
def test_what_ends_at_the_last_position_or_after_it_is_causal(horizon: int) -> None:
    for size in (horizon, horizon + 1):
        assert recognise_mask(chunked(size), horizon).window is None
        window = masking_utils.sliding_window_causal_mask_function(size)
        assert recognise_mask(window, horizon).window is None


@pytest.mark.parametrize("horizon", HORIZONS)
def test_chunks_are_no_window(horizon: int) -> None:
    for size in {2, 3, horizon // 3, horizon // 2, horizon - 2, horizon - 1}:
        with pytest.raises(CaptureError, match="window depends on the position"):
            recognise_mask(chunked(size), horizon)


def test_tokens_that_see_later_ones_are_refused() -> None:
    with pytest.raises(CaptureError, match="neither causal"):
        recognise_mask(masking_utils.bidirectional_mask_function, 16)
