"""The table of seeded defects, by kind: what is wrong, in which model, and what a message names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from seeding import (
    add_at,
    add_bits,
    attribute,
    constant,
    exchange_attributes,
    exchange_constants,
    exchange_tokens,
    field,
    ignore_the_mask,
    insert,
    operator,
    other_template,
    rename_input,
    tokenizer,
)


@dataclass(frozen=True)
class Defect:
    """One seeded defect.

    Attributes:
        name: What is wrong.
        model: Row of the tests' tables, or `tiny` for a Llama with an adapter and a tokenizer.
        seed: Damages a folder.
        names: What the message must hold: a layer, or a file and a field.
        dtype: Dtype of the export.
    """

    name: str
    model: str
    seed: Callable[[Path], None]
    names: tuple[str, ...]
    dtype: str = "fp32"


EPSILON = ("epsilon", lambda _: 3e-2)
GQA = "GroupQueryAttention"
GENAI = "genai_config.json"
K_PROJ = "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight"


def _epsilons() -> list[Defect]:
    rows = {"llama": (3, "layers.1."), "gemma2": (2, "layers.0."), "gpt2": (2, "h.1.")}
    rows |= {"gpt_neox": (3, "layers.1."), "qwen3": (2, "layers.0."), "falcon_new": (2, "h.1.")}
    return [
        Defect("norm epsilon", model, attribute("Norm", place, *EPSILON), (layer,))
        for model, (place, layer) in rows.items()
    ]


def _attention() -> list[Defect]:
    def scaled(scale: float) -> float:
        return scale * 1.05

    defects = [
        Defect("attention scale", model, attribute(GQA, 1, "scale", scaled), (layer,))
        for model, layer in (
            *(("llama", "layers.1."), ("gpt2", "h.1."), ("opt", "layers.1.")),
            *(("gemma3_text", "layers.1."), ("cohere", "layers.1."), ("phi3", "layers.1.")),
        )
    ]
    windows = {"mistral": "layers.0.", "gemma3_text": "layers.0.", "gpt_oss": "layers.0."}
    for model, layer in windows.items():
        for change, by in (("narrower", -1), ("wider", 1)):
            seed = attribute(GQA, 0, "local_window_size", partial(add, by))
            defects.append(Defect(f"window one {change}", model, seed, (layer,)))
    return [
        *defects,
        Defect("window where there is none", "llama",
               attribute(GQA, 0, "local_window_size", lambda _: 40), ("layers.0.",)),
        Defect("no window", "mistral",
               attribute(GQA, 1, "local_window_size", lambda _: -1), ("layers.1.",)),
        Defect("layer types exchanged", "gemma3_text", exchange_attributes(GQA, 0, 1),
               ("layers.0.",)),
        Defect("layer types exchanged", "gpt_oss", exchange_attributes(GQA, 0, 1), ("layers.0.",)),
        Defect("rotary pairs interleaved", "llama",
               attribute(GQA, 1, "rotary_interleaved", lambda _: 1), ("layers.1.",)),
        Defect("rotary pairs not interleaved", "cohere",
               attribute(GQA, 0, "rotary_interleaved", lambda _: 0), ("layers.0.",)),
        Defect("softcap", "gemma2", attribute(GQA, 1, "softcap", lambda s: s * 0.5),
               ("layers.1.",)),
        Defect("rotary table of another layer type", "gemma3_text",
               rename_input("cos_cache", "cos_cache_1", GQA, 0), ("layers.0", "cos_cache_1")),
        Defect("mask ignored", "llama", ignore_the_mask, ()),
    ]  # fmt: skip


def _tables() -> list[Defect]:
    beyond = add_at(slice(80, None), 0.5)
    return [
        Defect("rotary table beyond the prompt", model, constant(table, beyond), (table,))
        for model in ("llama", "qwen3_yarn", "gemma3_text")
        for table in ("cos_cache", "sin_cache")
    ] + [
        Defect("rotary table, one value", "phi3", constant("cos_cache", add_at((95, 3), 1e-3)),
               ("cos_cache", "95")),
        Defect("table of long texts", "phi3_longrope_short",
               constant("cos_cache", add_at((-3, 0), 0.5)), ("layers.0.",)),
        Defect("rotary table in fp16", "llama", constant("cos_cache", add_at((90, 1), 0.25)),
               ("cos_cache", "90"), "fp16"),
        Defect("learned positions beyond the prompt", "gpt2",
               constant("transformer.wpe.weight", add_at((90, 3), 1e-2)), ("wpe",)),
        Defect("learned positions beyond the prompt", "opt",
               constant("model.decoder.embed_positions.weight", add_at((90, 3), 1e-2)),
               ("embed_positions",)),
    ]  # fmt: skip


def _weights() -> list[Defect]:
    last = add_at((1, 2), 1e-4)
    plain = {
        ("llama", "model.layers.1.mlp.down_proj.weight"): "layers.1.mlp.down_proj",
        ("llama", "model.layers.0.self_attn.o_proj.weight"): "layers.0.self_attn.o_proj",
        ("llama", "lm_head.weight"): "lm_head",
        ("gpt2", "transformer.h.1.mlp.c_fc.weight"): "h.1.mlp.c_fc",
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"): "layers.1.mlp.gate",
        ("bert", "*layer.1.output.dense.weight"): "layer.1.output.dense",
        ("vit", "*layers.1.mlp.fc2.weight"): "layers.1.mlp.fc2",
    }
    defects = [
        Defect("unadapted weight, one value", model, constant(name, last), (layer,))
        for (model, name), layer in plain.items()
    ]
    vectors = {
        ("llama", "model.layers.1.post_attention_layernorm.weight"): "layers.1.post_attention",
        ("llama_bias", "model.layers.0.mlp.down_proj.bias"): "layers.0.mlp.down_proj",
        ("gpt2", "transformer.h.0.attn.c_attn.bias"): "h.0.attn.c_attn",
        ("gemma2", "model.layers.1.input_layernorm.weight_plus_one"): "layers.1.input_layernorm",
        ("bert", "*layer.0.attention.output.LayerNorm.weight"): "layer.0.attention.output",
    }
    defects += [
        Defect("norm or bias, one value", model, constant(name, add_at(-1, 1e-4)), (layer,))
        for (model, name), layer in vectors.items()
    ]
    return [
        *defects,
        Defect("embedding row that no token reads", "llama",
               constant("model.embed_tokens.weight", add_at((57, 3), 1e-3)), ("embed_tokens",)),
        Defect("embedding row that no token reads", "bert",
               constant("*predictions.decoder.weight", add_at((57, 3), 1e-3)), ("decoder",)),
        Defect("a value of q, k or v", "tiny", constant(K_PROJ, add_at((5, 60), 1e-3)),
               ("layers.1.self_attn.k_proj",)),
        Defect("layers exchanged", "llama",
               exchange_constants("model.layers.0.mlp.down_proj.weight",
                                  "model.layers.1.mlp.down_proj.weight"), ("mlp.down_proj",)),
        Defect("weight not transposed", "llama",
               constant("model.layers.0.self_attn.o_proj.weight", lambda w: w.T),
               ("layers.0.self_attn.o_proj",)),
        Defect("weight transposed", "gpt2",
               constant("transformer.h.1.attn.c_proj.weight", lambda w: w.T),
               ("h.1.attn.c_proj", "transposed")),
        Defect("a weight of fp16, last bit", "llama",
               constant("model.layers.0.mlp.down_proj.weight",
                        lambda w: np.nextafter(w, np.float16(1), dtype=np.float16)),
               ("layers.0.mlp.down_proj",), "fp16"),
        Defect("scale of a block", "llama",
               constant("model.layers.1.mlp.down_proj.weight.scales", lambda s: s * 1.5),
               ("layers.1.mlp.down_proj",), "int4"),
        Defect("a code", "llama",
               constant("model.layers.0.mlp.down_proj.weight.codes", add_bits((3, 1, 2), 0x0C)),
               ("layers.0.mlp.down_proj",), "int4"),
        Defect("bits of codes", "llama", attribute("MatMulNBits", 2, "bits", lambda b: b + 1),
               ("layers.0.mlp.gate_proj",), "int4"),
        Defect("size of blocks", "llama",
               attribute("MatMulNBits", 2, "block_size", lambda b: b * 2),
               ("layers.0.mlp.gate_proj",), "int4"),
        Defect("accuracy level", "llama",
               attribute("MatMulNBits", 2, "accuracy_level", lambda _: 1),
               ("layers.0.mlp.gate_proj", "accuracy_level"), "int4"),
        Defect("zero point", "llama",
               constant("model.layers.0.self_attn.o_proj.weight.zero_points",
                        add_bits((7, 0), 0x07)),
               ("layers.0.self_attn.o_proj",), "int4"),
    ]  # fmt: skip


def _computations() -> list[Defect]:
    return [
        Defect("another activation", "llama", operator("Sigmoid", 1, "Tanh"), ("layers.1.mlp",)),
        Defect("another activation", "qwen3", operator("Sigmoid", 0, "Tanh"), ("layers.0.mlp",)),
        Defect("window in a later layer, beyond the prompts", "llama",
               attribute(GQA, 1, "local_window_size", lambda _: 70), ("layers.1",)),
        Defect("gelu of another kind", "bert",
               operator("BiasGelu", 0, "FastGelu"), ("layer.0",)),
        Defect("norm epsilon", "bert", attribute("LayerNorm", 3, "epsilon", lambda _: 0.3),
               ("layer.1.",)),
        Defect("norm epsilon", "vit", attribute("LayerNorm", 2, "epsilon", lambda _: 0.3),
               ("layers.1.",)),
        Defect("attention scale", "distilbert",
               attribute("MultiHeadAttention", 1, "scale", lambda _: 0.5), ("layer.1.",)),
        Defect("clipped experts", "gpt_oss", attribute("MoE", 1, "swiglu_limit", lambda _: 0.1),
               ("layers.1.mlp",)),
        Defect("experts' activation", "gpt_oss",
               attribute("MoE", 0, "activation_alpha", lambda a: a * 1.2), ("layers.0.mlp",)),
        Defect("fewer experts", "qwen3_moe", attribute("MoE", 1, "k", lambda _: 1),
               ("layers.1.mlp",)),
        Defect("logits scaled", "cohere",
               constant("constant_2", lambda c: c * np.float32(1.1)), ()),
    ]  # fmt: skip


def _experts() -> list[Defect]:
    """Mixtures in fp16; what is inserted leaves every constant as it is."""
    layer = ("layers.1.mlp",)

    def exchanged(count: int) -> np.ndarray:
        order = np.arange(count)
        order[[1, 2]] = [2, 1]
        return order

    def raised(count: int, dtype: type) -> np.ndarray:
        return np.where(np.arange(count) == 1, 0.5, 0).astype(dtype)

    defects = []
    for model, count in (
        *(("qwen3_moe_64", 64), ("olmoe_64", 64), ("mixtral_8", 8), ("gpt_oss_8", 8)),
    ):
        seeds = {
            "scores of two experts exchanged": insert(
                "MoE", 1, 1, "Gather", exchanged(count), axis=-1
            ),
            "weights of two experts exchanged": insert(
                "MoE", 1, 4, "Gather", exchanged(count), axis=0
            ),
            "one expert less": attribute("MoE", 1, "k", partial(add, -1)),
            "one expert more": attribute("MoE", 1, "k", partial(add, 1)),
            "weights of experts normalized or not": attribute(
                "MoE", 1, "normalize_routing_weights", lambda n: 1 - (n or 0)
            ),
            "a value of an expert": constant(
                "model.layers.1.mlp.experts.down_proj", add_at((count - 1, 3, 5), 1e-2)
            ),
            "bias of a router": insert("MoE", 1, 1, "Add", raised(count, np.float16)),
        }
        defects += [Defect(n, model, seed, layer, "fp16") for n, seed in seeds.items()]
    groups = {
        "a value of an expert": constant(
            "model.layers.1.mlp.experts.down_proj", add_at((63, 3, 5), 1e-2)
        ),
        "scores of two experts exchanged": insert("TopK", 2, 0, "Gather", exchanged(64), axis=-1),
        "bias of a router": insert("TopK", 2, 0, "Add", raised(64, np.float32)),
        "scores of two groups exchanged": insert("TopK", 1, 0, "Gather", exchanged(4), axis=-1),
    }
    return defects + [Defect(n, "glm4_moe_64", seed, layer, "fp16") for n, seed in groups.items()]


def _quantized_experts() -> list[Defect]:
    """Mixtures in int4 and int8, whose experts are QMoE's."""
    layer, experts = ("layers.1.mlp",), "model.layers.1.mlp.experts"
    up, down = (f"{experts}.{name}_proj" for name in ("gate_up", "down"))

    def exchanged(array: np.ndarray) -> np.ndarray:
        return array[[0, 2, 1, *range(3, len(array))]]

    order = exchanged(np.arange(8))
    defects = []
    for model, dtype in (*(("mixtral_8", "int4"), ("gpt_oss_8", "int4")), ("mixtral_8", "int8")):
        half = 0x0C if dtype == "int4" else 0x30
        seeds = {
            "a code of an expert": (
                constant(f"{down}.codes", add_bits((5, 3, 2), half)), (down, "expert 5")
            ),
            "scale of an expert's block": (
                constant(f"{up}.scales", lambda s: s.__setitem__((3, 7, 1), 1.5 * s[3, 7, 1])),
                (up, "expert 3"),
            ),
            "zero point of an expert": (
                constant(f"{down}.zero_points", add_bits((7, 9, 0), half)), (down, "expert 7")
            ),
            "codes of two experts exchanged": (
                constant(f"{up}.codes", exchanged), (up, "expert 1")
            ),
            "bits of an expert's codes": (
                attribute("QMoE", 1, "expert_weight_bits", lambda b: 12 - b), (up,)
            ),
            "size of experts' blocks": (attribute("QMoE", 1, "block_size", lambda b: b * 2), (up,)),
            "scores of two experts exchanged": (
                insert("QMoE", 1, 1, "Gather", order, axis=-1), layer
            ),
            "one expert less": (attribute("QMoE", 1, "k", partial(add, -1)), layer),
            "experts' activation": (
                attribute("QMoE", 1, "activation_alpha", lambda a: a * 1.2), layer
            ),
        }  # fmt: skip
        defects += [Defect(n, model, seed, names, dtype) for n, (seed, names) in seeds.items()]
    softmax = exchanged(np.arange(64))
    return [
        *defects,
        Defect("weights of two experts exchanged", "qwen3_moe_64",
               insert("QMoE", 1, 14, "Gather", softmax, axis=-1), layer, "int4"),
        Defect("weights of experts normalized or not", "qwen3_moe_64",
               attribute("QMoE", 1, "normalize_routing_weights", lambda _: 1), (up,), "int4"),
        Defect("weights of experts normalized or not", "mixtral_8",
               attribute("QMoE", 1, "normalize_routing_weights", lambda _: 0), (up,), "int4"),
        Defect("rows of experts told to be prepacked", "gpt_oss_8",
               attribute("QMoE", 1, "weights_prepacked", lambda _: -1), (up,), "int4"),
    ]  # fmt: skip


def _beside() -> list[Defect]:
    fields: dict[str, Any] = {
        "model.decoder.head_size": lambda n: n + 8,
        "model.decoder.num_key_value_heads": lambda n: n * 2,
        "model.decoder.num_hidden_layers": lambda n: n - 1,
        "model.decoder.num_attention_heads": lambda n: n + 1,
        "model.decoder.hidden_size": lambda n: n * 2,
        "model.decoder.filename": "other.onnx",
        "model.decoder.inputs.past_key_names": "past.%d.key",
        "model.decoder.outputs.logits": "scores",
        "model.vocab_size": lambda n: n + 1,
        "model.context_length": lambda n: n * 4,
        "model.eos_token_id": lambda n: (n or 0) + 3,
        "model.bos_token_id": lambda n: (n or 0) + 3,
        "model.pad_token_id": lambda n: (n or 0) + 3,
        "search.max_length": lambda n: n * 4,
    }
    return [
        *(
            Defect(f"{GENAI}: {name}", "tiny", field(name, value), (GENAI, name.split(".")[-1]))
            for name, value in fields.items()
            if ".inputs." not in name and ".outputs." not in name
        ),
        Defect(f"{GENAI}: names of the past", "tiny",
               field("model.decoder.inputs.past_key_names", "past.%d.key"), (GENAI, "inputs")),
        Defect(f"{GENAI}: name of the logits", "tiny",
               field("model.decoder.outputs.logits", "scores"), (GENAI, "outputs")),
        Defect("another tokenizer", "tiny", tokenizer(exchange_tokens), ("tokenizer.json",)),
        Defect("a token that is gone", "tiny",
               tokenizer(lambda c: c["added_tokens"].pop()), ("tokenizer.json",)),
        Defect("another chat template", "tiny", other_template, ("chat template",)),
    ]  # fmt: skip


DEFECTS = [
    *_epsilons(),
    *_attention(),
    *_tables(),
    *_weights(),
    *_computations(),
    *_experts(),
    *_quantized_experts(),
    *_beside(),
]
