"""Tensors of a checkpoint that the model does not take, and parameters that nobody brings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForPreTraining,
    ResNetConfig,
    ResNetModel,
)

from bone_fx.base.conversions import plan_loading
from bone_fx.base.loading import architecture_for_task, open_base, skeleton
from bone_fx.base.skeleton import complete, meta_model
from bone_fx.base.unused_tensors import account_for_unused
from bone_fx.errors import BaseModelError
from bone_fx.weights.load_plan import LoadPlan, recipes_for
from tests.end_to_end.tiny import tiny_base
from tests.weights.checkpoints import edit_json

LAYER = "model.layers.1.self_attn"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("llama") / "base", tie_word_embeddings=False)


def edited(base: Path, folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a base with other tensors in its file."""
    folder.mkdir()
    tensors = load_file(base / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


def with_tensors(**named: Tensor) -> Callable[[dict[str, Tensor]], object]:
    """An edit that adds tensors; `__` in a name stands for a dot."""
    return lambda tensors: tensors.update({k.replace("__", "."): v for k, v in named.items()})


def notes_of(folder: Path, *allowed: str, task: str | None = None) -> list[str]:
    base = open_base(folder)
    model, plan = skeleton(base, torch.float32, architecture=architecture_for_task(base, task))
    return account_for_unused(model, plan, base.tensors, allowed)


REFUSED: list[tuple[str, Tensor, str]] = [
    (f"{LAYER}.k_proj.bias", torch.zeros(48), "a bias, and config.json builds the layer without"),
    ("lm_head.bias", torch.zeros(128), "a bias"),
    ("model.norm.bias", torch.zeros(48), "a bias"),
    (f"{LAYER}.attn.bias", torch.zeros(48), "part of a layer"),
    (f"{LAYER}.k_proj.weight_scale", torch.ones(()), "does not declare"),
    (f"{LAYER}.k_proj.input_scale", torch.ones(1), "does not declare"),
    (f"{LAYER}.k_proj.weight_scale_inv", torch.ones(1, 1), "does not declare"),
    ("model.layers.2.input_layernorm.weight", torch.ones(48), "part of a layer"),
    (f"{LAYER}.q_norm.weight", torch.ones(16), "part of a layer"),
    ("model.stranger.weight", torch.ones(3), "a part that the model does not have"),
    ("stranger", torch.ones(3), "a part that the model does not have"),
]


@pytest.mark.parametrize(("key", "value", "meaning"), REFUSED, ids=[key for key, _, _ in REFUSED])
def test_what_would_be_lost_is_refused(
    key: str, value: Tensor, meaning: str, llama: Path, tmp_path: Path
) -> None:
    folder = edited(llama, tmp_path / "base", lambda tensors: tensors.update({key: value}))
    with pytest.raises(BaseModelError, match="1 tensor of the checkpoint would be lost") as caught:
        notes_of(folder)
    assert caught.value.exit_code == 3
    assert key in str(caught.value)
    assert meaning in str(caught.value)
    pattern = key.replace("layers.1", "layers.*")
    assert notes_of(folder, pattern) == [f"left out as allowed: {key} of the base"]


def test_many_are_counted(llama: Path, tmp_path: Path) -> None:
    names = [f"model.layers.{i}.mlp.{p}_proj.bias" for i in (0, 1) for p in ("up", "gate", "down")]
    folder = edited(
        llama, tmp_path / "base", lambda t: t.update({n: torch.zeros(3) for n in names})
    )
    with pytest.raises(BaseModelError, match=r"(?s)6 tensors .* and 2 more"):
        notes_of(folder, "nothing.like.*")


def test_constants_that_models_compute_are_harmless(llama: Path, tmp_path: Path) -> None:
    constants = with_tensors(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8),
        model__layers__0__attn__bias=torch.ones(1, 1, 4, 4).tril(),
        model__layers__0__attn__masked_bias=torch.tensor(-1e4),
        model__position_ids=torch.arange(9)[None],
    )
    assert notes_of(edited(llama, tmp_path / "base", constants)) == []


def test_two_tensors_for_one_parameter(llama: Path, tmp_path: Path) -> None:
    key = "layers.1.self_attn.k_proj.weight"  # as a model without its head saves it
    folder = edited(llama, tmp_path / "base", lambda t: t.update({key: torch.ones(48, 48)}))
    with pytest.raises(
        BaseModelError, match=r"a second tensor beside layers\.1\.self_attn\.k_proj"
    ):
        notes_of(folder)


def test_second_copies_are_harmless(llama: Path, tmp_path: Path) -> None:
    def copy(tensors: dict[str, Tensor]) -> None:
        tensors["layers.1.self_attn.k_proj.weight"] = tensors[f"{LAYER}.k_proj.weight"].clone()

    assert notes_of(edited(llama, tmp_path / "base", copy)) == []


def test_heads_and_towers_are_named(llama: Path, tmp_path: Path) -> None:
    parts = with_tensors(
        v_head__summary__weight=torch.ones(1, 48),
        model__vision_tower__layers__0__fc__weight=torch.ones(3),
        model__vision_tower__layers__1__fc__weight=torch.ones(3),
    )
    folder = edited(llama, tmp_path / "base", parts)
    assert notes_of(folder, task="CAUSAL_LM") == [
        "left out: vision_tower of the base (2 tensors), which LlamaForCausalLM does not have",
        "left out: v_head of the base (1 tensor), which LlamaForCausalLM does not have",
    ]
    body = notes_of(folder, task="FEATURE_EXTRACTION")
    assert [note.split()[2] for note in body] == ["lm_head", "vision_tower", "v_head"]
    first, *_ = notes_of(folder, task="SEQ_CLS")
    assert first.startswith("left out: lm_head of the base (1 tensor), which LlamaForSequence")


def test_a_tower_that_the_class_does_not_mind_is_named_too(llama: Path) -> None:
    model = skeleton(open_base(llama), torch.float32).model
    plan = LoadPlan({}, ignored={"a": "model.visual.proj.weight", "b": "mtp.fc.weight"})
    notes = account_for_unused(model, plan, {})
    assert notes == [
        "left out: visual of the base (1 tensor), which LlamaForCausalLM does not have"
    ]


def test_a_body_takes_its_layers_whole(llama: Path, tmp_path: Path) -> None:
    key = f"{LAYER}.k_proj.bias"
    folder = edited(llama, tmp_path / "base", lambda t: t.update({key: torch.zeros(48)}))
    with pytest.raises(BaseModelError, match="LlamaModel, as it is described"):
        notes_of(folder, task="FEATURE_EXTRACTION")


def test_a_bias_of_logits_belongs_to_the_head(tmp_path: Path) -> None:
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32}
    config = BartConfig(**sizes, **layers, encoder_ffn_dim=40, decoder_ffn_dim=40)
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    notes = notes_of(tmp_path, task="FEATURE_EXTRACTION")
    assert [note.split()[2] for note in notes] == ["final_logits_bias"]


@pytest.mark.parametrize("name", ["model.pre_head_norm.weight", "logit_scale", "score_scale"])
def test_what_is_named_like_a_head_and_changes_the_body(
    name: str, llama: Path, tmp_path: Path
) -> None:
    folder = edited(llama, tmp_path / "base", lambda t: t.update({name: torch.ones(48)}))
    with pytest.raises(BaseModelError, match=name.split(".")[0]):
        notes_of(folder)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [("BertModel", ["cls"]), ("BertForMaskedLM", ["pooler", "seq_relationship"])],
)
def test_bert_for_pre_training_as_another_class(
    name: str, left_out: list[str], tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "vocab_size": 60}
    config = BertConfig(num_hidden_layers=1, intermediate_size=40, **sizes)
    BertForPreTraining(config).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", architectures=[name])
    assert [note.split()[2] for note in notes_of(tmp_path)] == left_out


@pytest.mark.parametrize("lost", ["model.norm.weight", f"{LAYER}.q_proj.weight", "lm_head.weight"])
def test_what_nobody_brings_is_not_random(lost: str, llama: Path, tmp_path: Path) -> None:
    base = open_base(edited(llama, tmp_path / "base", lambda tensors: tensors.pop(lost)))
    with pytest.raises(BaseModelError, match="nothing is initialised at random"):
        recipes_for(*skeleton(base, torch.float32), base.tensors)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_codes_are_no_weights(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    name = f"{LAYER}.q_proj.weight"
    folder = edited(llama, tmp_path / "base", lambda t: t.update({name: t[name].to(dtype)}))
    base = open_base(folder)
    with pytest.raises(
        BaseModelError, match=f"is stored as {str(dtype)[6:]}: these are no weights"
    ):
        recipes_for(*skeleton(base, torch.float32), base.tensors)


def test_statistics_are_not_made_up(tmp_path: Path) -> None:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetModel(config).save_pretrained(tmp_path / "whole")

    def drop(ending: str) -> Callable[[dict[str, Tensor]], object]:
        return lambda t: [t.pop(key) for key in list(t) if key.endswith(ending)]

    counted = open_base(edited(tmp_path / "whole", tmp_path / "a", drop("num_batches_tracked")))
    recipes_for(*skeleton(counted, torch.float32), counted.tensors)
    bare = open_base(edited(tmp_path / "whole", tmp_path / "b", drop("running_var")))
    with pytest.raises(BaseModelError, match="running_var"):
        recipes_for(*skeleton(bare, torch.float32), bare.tensors)


def test_random_values_are_not_computed_ones(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class may say that a tensor need not be there though its own code draws it at random."""
    base = open_base(llama)
    kind = base.architecture
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_missing", [r"q_proj", r"norm"])
    kept = {k: v for k, v in base.tensors.items() if "q_proj" not in k and k != "model.norm.weight"}
    model = meta_model(base.config, torch.float32, kind)
    plan = plan_loading(model, kept)
    complete(model, torch.float32, plan)
    with pytest.raises(BaseModelError, match=r"2 parameter.*q_proj"):
        recipes_for(model, plan, kept)
    assert torch.equal(model.get_parameter("model.norm.weight"), torch.ones(48))
