"""Recipes of every architecture against what `from_pretrained` loads, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bone_fx.base.loading import architecture_for_task, open_base, skeleton
from bone_fx.errors import AdapterError, BaseModelError
from bone_fx.weights.load_plan import recipes_for
from bone_fx.weights.recipes.recipe import Concat, Converted
from tests.capture.architectures import BY_NAME
from tests.weights.checkpoints import agree, all_tensors, save

ROPE: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 25,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
}


@pytest.mark.parametrize("name", [name for name in BY_NAME if "+" not in name])
def test_equals_from_pretrained(name: str, tmp_path: Path) -> None:
    save(BY_NAME[name], tmp_path)
    agree(tmp_path)


@pytest.mark.parametrize(
    "name", ["llama", "gemma3_text", "mixtral", "vit", "bert", "gpt2", "t5", "whisper"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_and_shards(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(BY_NAME[name], tmp_path, shard="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    agree(tmp_path, dtype)


def test_half_precision_keeps_what_transformers_keeps_in_float32(tmp_path: Path) -> None:
    """DeepSeek's routing bias is a buffer of the file, GPT-J's sinusoids are computed."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, GPTJConfig, GPTJForCausalLM

    heads = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
    routing = {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 16}
    common = {**BY_NAME["llama"].config, "num_key_value_heads": 4}
    DeepseekV3ForCausalLM(
        DeepseekV3Config(**common, **heads, **experts, **routing)
    ).save_pretrained(tmp_path / "deepseek")
    model = agree(tmp_path / "deepseek", torch.float16)
    bias = model.get_buffer("model.layers.1.mlp.gate.e_score_correction_bias")
    assert bias.dtype == torch.float32

    tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
    config = GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=64, **tokens)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "gptj")
    agree(tmp_path / "gptj", torch.float16)


@pytest.mark.parametrize("kind", ROPE)
def test_rope_scaling(kind: str, tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path, rope_parameters=ROPE[kind])
    agree(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tied: bool, tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path, tie_word_embeddings=tied)
    model = agree(tmp_path)
    tensors = all_tensors(model)
    base = open_base(tmp_path)
    recipes = recipes_for(model, base.plan(model), base.tensors)
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    assert (tensors[head] is tensors[embedding]) == (recipes[head] is recipes[embedding]) == tied


@pytest.mark.parametrize("alike", [True, False])
def test_tied_by_config_with_both_in_the_file(alike: bool, tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(
        {**tensors, "lm_head.weight": embedding.clone() if alike else embedding + 1},
        file,
        {"format": "pt"},
    )
    model = agree(tmp_path)
    assert (
        model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")
    ) == alike


def test_untied_on_request(tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path, tie_word_embeddings=True)
    base = open_base(tmp_path)
    model, plan = skeleton(base, torch.float32, untie=["lm_head.weight"])
    recipes = recipes_for(model, plan, base.tensors)
    assert model.get_parameter("lm_head.weight") is not model.get_parameter(
        "model.embed_tokens.weight"
    )
    assert recipes["lm_head.weight"] is not recipes["model.embed_tokens.weight"]
    assert torch.equal(
        recipes["lm_head.weight"].evaluate(), recipes["model.embed_tokens.weight"].evaluate()
    )


def test_experts_are_stacked_by_transformers_own_operations(tmp_path: Path) -> None:
    save(BY_NAME["mixtral"], tmp_path)
    base = open_base(tmp_path)
    recipe = recipes_for(*skeleton(base, torch.float32), base.tensors)[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]
    assert isinstance(recipe, Concat)
    experts = [each for each in recipe.recipes if isinstance(each, Converted)]
    assert [len(each.sources) for each in experts] == [2] * 4
    assert "MergeModulelist" in recipe.describe()


def test_head_class_from_a_bare_model_and_back(tmp_path: Path) -> None:
    save(BY_NAME["bert"], tmp_path)
    agree(tmp_path, model_class="BertForMaskedLM")
    bare = tmp_path / "bare"
    BY_NAME["bert"].build().bert.save_pretrained(bare)
    base = open_base(bare)
    architecture = architecture_for_task(base, "SEQ_CLS")
    model, plan = skeleton(base, torch.float32, architecture=architecture)
    with pytest.raises(BaseModelError, match=r"pooler|classifier"):
        recipes_for(model, plan, base.tensors)


def test_missing_head_comes_from_the_adapter(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    BertModel(BertConfig(**BY_NAME["bert"].config)).save_pretrained(tmp_path)
    base = open_base(tmp_path)
    model, plan = skeleton(
        base,
        torch.float16,
        architecture=architecture_for_task(base, "SEQ_CLS"),
        config_overrides={"num_labels": 3},
    )
    head = {"classifier.weight": torch.randn(3, 64), "classifier.bias": torch.randn(3)}
    recipes = recipes_for(model, plan, base.tensors, extra=head)
    assert torch.equal(recipes["classifier.weight"].evaluate(), head["classifier.weight"].half())
    assert (
        recipes["bert.pooler.dense.weight"]
        .describe()
        .startswith("read model.safetensors:pooler.dense.weight")
    )
    with pytest.raises(BaseModelError, match="classifier"):
        recipes_for(model, plan, base.tensors)
    with pytest.raises(AdapterError, match="score"):
        recipes_for(model, plan, base.tensors, extra={**head, "score.weight": torch.zeros(3, 64)})
    with pytest.raises(AdapterError, match=r"classifier\.bias"):
        recipes_for(model, plan, base.tensors, extra={**head, "classifier.bias": torch.zeros(4)})


def test_old_names_of_norms(tmp_path: Path) -> None:
    save(BY_NAME["bert"], tmp_path)
    file = tmp_path / "model.safetensors"
    renamed = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in load_file(file).items()
    }
    save_file(renamed, file, {"format": "pt"})
    agree(tmp_path)


def test_unexpected_names_are_listed(tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path)
    file = tmp_path / "model.safetensors"
    more = {
        "stranger.weight": torch.zeros(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
    }
    save_file({**load_file(file), **more}, file, {"format": "pt"})
    base = open_base(tmp_path)
    assert list(base.plan(agree(tmp_path)).unexpected) == ["stranger.weight"]


def test_parameter_without_bytes_is_named(tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_project.weight"] = tensors.pop(
        "model.layers.1.mlp.up_proj.weight"
    )
    save_file(tensors, file, {"format": "pt"})
    base = open_base(tmp_path)
    with pytest.raises(BaseModelError) as caught:
        recipes_for(*skeleton(base, torch.float32), base.tensors)
    assert "model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "up_project" in str(caught.value)


def test_a_missing_expert_is_an_error(tmp_path: Path) -> None:
    save(BY_NAME["mixtral"], tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[next(key for key in tensors if "experts.2.w1" in key)]
    save_file(tensors, file, {"format": "pt"})
    base = open_base(tmp_path)
    with pytest.raises(BaseModelError, match="gate_up_proj"):
        recipes_for(*skeleton(base, torch.float32), base.tensors)


def test_another_width_is_an_error(tmp_path: Path) -> None:
    save(BY_NAME["llama"], tmp_path)
    base = open_base(tmp_path)
    model, plan = skeleton(base, torch.float32, config_overrides={"intermediate_size": 112})
    with pytest.raises(BaseModelError, match="another shape"):
        recipes_for(model, plan, base.tensors)
