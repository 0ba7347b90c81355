"""Example inputs of a transformers model, from its configuration: sizes only, two rows."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import torch

from bone_fx.capture.trace.config_sizes import size_in
from bone_fx.errors import UsageError

ROWS, LENGTH, DECODER_LENGTH = 2, 7, 5
_SAMPLES = 16000
_KINDS = ("input_ids", "pixel_values", "input_features", "input_values", "decoder_input_ids")
"""Names of a model's main inputs, by what transformers' classes call them."""


def default_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Inputs of the model's main kind (text, image, audio) with what its forward cannot do without.

    Text gets `input_ids` and `attention_mask`; segments (`token_type_ids`) are all of the first
    kind unless the caller's own example inputs have them. An encoder-decoder gets
    `decoder_input_ids`; the encoder of one, whose configuration is the pair's, does not.

    Raises:
        UsageError: The kind of input is not known.
        CaptureError: A field of the configuration that states a size holds something else.
    """
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    if main == "input_ids":
        length = min(LENGTH, size_in(config, "max_position_embeddings") or LENGTH)
        inputs["input_ids"] = torch.zeros(ROWS, length, dtype=torch.long)
        inputs["attention_mask"] = torch.ones(ROWS, length, dtype=torch.long)
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        channels = size_in(vision, "num_channels") or 3
        inputs[main] = torch.zeros(ROWS, channels, *_image_size(vision), dtype=dtype)
    elif main == "input_values":
        inputs[main] = torch.zeros(ROWS, _SAMPLES, dtype=dtype)
    elif (
        main == "input_features"
        and (bins := size_in(config, "num_mel_bins"))
        and (frames := size_in(config, "max_source_positions"))
    ):
        inputs[main] = torch.zeros(ROWS, bins, 2 * frames, dtype=dtype)
    else:
        raise UsageError(
            f"{type(model).__name__} takes {main}, which cannot be made up from the configuration",
            next_step="pass example_inputs",
        )
    takes_two_texts = "decoder_input_ids" in inspect.signature(model.forward).parameters
    if takes_two_texts and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.zeros(ROWS, DECODER_LENGTH, dtype=torch.long)
    return inputs


def missing_inputs(
    model: torch.nn.Module, given: Collection[str], error: Exception
) -> dict[str, str]:
    """What an error of a model that was not given one of its kinds of input says beside its text.

    Args:
        model: The model.
        given: Names of the inputs that it was given.
        error: What it raised.

    Returns:
        `expected` and `next_step` of the error; nothing where no input is to blame.
    """
    takes = inspect.signature(model.forward).parameters
    names = [name for name in _KINDS if name in takes and name not in given]
    text = str(error)
    if not names or not ("NoneType" in text or any(name in text for name in names)):
        return {}
    listed = " and ".join(names)
    return {
        "expected": f"{listed} beside {', '.join(given)}: the model's forward takes them",
        "next_step": f"call bone_fx with the model itself and example_inputs that hold {listed} "
        "too, or use the class of one of its parts",
    }


def _image_size(config: Any) -> tuple[int, int]:
    """Height and width of an image: one number, the last two of several, or by name."""
    size = getattr(config, "image_size", None)
    if isinstance(size, dict) and {"height", "width"} <= size.keys():
        return size["height"], size["width"]
    if isinstance(size, list | tuple) and len(size) > 1:
        return size[-2], size[-1]
    side = size_in(config, "image_size") or 224
    return side, side
