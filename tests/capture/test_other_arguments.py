"""Arguments that change a model's outputs and are no inputs of its graph are found by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from bone_fx.capture.other_arguments import modules_without_use, other_arguments
from bone_fx.capture.trace.default_inputs import default_inputs

SIZES: Any = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "vocab_size": 60,
}
SPEECH: Any = {
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 3,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
}
VISION: Any = {"image_size": 16, "patch_size": 8}
ROWS: list[tuple[Any, list[str]]] = [
    (lambda: BertModel(BertConfig(**SIZES, type_vocab_size=2)), ["token_type_ids"]),
    (lambda: BertModel(BertConfig(**SIZES, type_vocab_size=1)), []),
    (lambda: RobertaModel(RobertaConfig(**SIZES, type_vocab_size=1)), []),
    (
        lambda: BertModel(BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)),
        ["token_type_ids", "encoder_hidden_states", "encoder_attention_mask"],
    ),
    (
        lambda: T5ForConditionalGeneration(
            T5Config(d_model=48, d_kv=16, d_ff=80, num_layers=1, num_heads=3, vocab_size=60)
        ),
        ["decoder_attention_mask"],
    ),
    (lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **SPEECH)), ["attention_mask"]),
    (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), []),
    (lambda: ViTModel(ViTConfig(**{**SIZES, **VISION})), ["attention_mask"]),
]


@pytest.mark.parametrize(("build", "expected"), ROWS)
def test_arguments_that_matter_are_found(build: Any, expected: list[str]) -> None:
    model = build().eval()
    assert other_arguments(model, default_inputs(model)) == expected


def test_images_of_a_text_graph_are_named() -> None:
    text = LlamaConfig(**SIZES)
    vision = CLIPVisionConfig(**{**SIZES, **VISION})
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=59)
    ).eval()
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert other_arguments(model, {"input_ids": ids, "attention_mask": ids}) == ["pixel_values"]
    used = [name for name, _ in model.named_parameters() if "language_model" in name]
    left_out = ["model.vision_tower", "model.multi_modal_projector"]
    assert modules_without_use(model, [*used, "lm_head.weight"]) == left_out


def test_a_tied_weight_is_used_under_either_name() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    used = [name for name, _ in model.named_parameters() if name != "lm_head.weight"]
    assert modules_without_use(model, used) == []
