"""What a model says that was not given one of its kinds of input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from bone_fx.capture.forward import capture_forward
from bone_fx.capture.training.capture_training import capture_training
from bone_fx.errors import CaptureError


def test_images_that_a_model_of_two_towers_misses_are_named() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 2, "projection_dim": 16,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 98}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    ids = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    for capture in (lambda: capture_forward(model), lambda: capture_training(model, ids)):
        with pytest.raises(CaptureError, match="pixel_values beside input_ids") as caught:
            capture()
        assert "example_inputs that hold pixel_values" in str(caught.value.next_step)
