"""Example inputs of a transformers model, from its configuration: sizes only, two rows."""

from __future__ import annotations

from typing import Any

import torch

from bone_fx.errors import UsageError

ROWS, LENGTH, DECODER_LENGTH = 2, 7, 5
_SAMPLES = 16000


def default_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Inputs of the model's main kind (text, image, audio) with what its forward cannot do without.

    Text gets `input_ids` and `attention_mask`; segments (`token_type_ids`) are all of the first
    kind unless the caller's own example inputs have them. An encoder-decoder gets
    `decoder_input_ids`.

    Raises:
        UsageError: The kind of input is not known.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
        inputs["input_ids"] = torch.zeros(ROWS, length, dtype=torch.long)
        inputs["attention_mask"] = torch.ones(ROWS, length, dtype=torch.long)
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        inputs[main] = torch.zeros(
            ROWS, getattr(vision, "num_channels", 3), height, width, dtype=dtype
        )
    elif main == "input_values":
        inputs[main] = torch.zeros(ROWS, _SAMPLES, dtype=dtype)
    elif (
        main == "input_features"
        and hasattr(config, "num_mel_bins")
        and hasattr(config, "max_source_positions")
    ):
        inputs[main] = torch.zeros(
            ROWS, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype
        )
    else:
        raise UsageError(
            f"{type(model).__name__} takes {main}, which cannot be made up from the configuration",
            next_step="pass example_inputs",
        )
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(ROWS, DECODER_LENGTH, dtype=torch.long)
    return inputs
