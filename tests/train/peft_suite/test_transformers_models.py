"""Adapters on transformers models: PEFT's generic tests of them, beside PEFT 0.18.1."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import bone_fx
from bone_fx.errors import UsageError
from tests.train.peft_models import in_peft, llama, peft_load
from tests.train.peft_suite.rows import close, give, moved, training

pytestmark = pytest.mark.usefixtures("captures_once")

IDS = torch.tensor([[1, 1, 1], [1, 2, 1]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 1]])
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
T5 = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def of(name: str, sizes: dict[str, Any]) -> Any:
    """A model of transformers, by its class's name, in evaluation mode."""
    kind: Any = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**sizes)).eval()


MODELS: dict[str, tuple[Callable[[], Any], str | None]] = {
    "decoder": (lambda: llama().eval(), "CAUSAL_LM"),
    "classifier": (lambda: of("BertForSequenceClassification", SIZES), "SEQ_CLS"),
    "encoder": (lambda: of("BertModel", SIZES), "FEATURE_EXTRACTION"),
    # PEFT 0.18.1's class for SEQ_2_SEQ_LM asks transformers 5 for a method that it has no more.
    "seq2seq": (lambda: of("T5ForConditionalGeneration", T5), None),
}
SLOW = {"classifier", "encoder", "seq2seq"}


def models(*names: str) -> Any:
    return pytest.mark.parametrize(
        "name",
        [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in names or MODELS],
    )


def inputs(name: str) -> dict[str, Tensor]:
    more = {"decoder_input_ids": IDS} if name == "seq2seq" else {}
    return {"input_ids": IDS, "attention_mask": MASK, **more}


def config(name: str, **fields: Any) -> Any:
    return peft.MissConfig(
        **{"r": 2, "init_weights": False, "task_type": MODELS[name][1], **fields}
    )


@functools.cache
def _captured(name: str) -> bone_fx.AdaptedModule:
    adapted = bone_fx.get_peft_model(MODELS[name][0](), config(name)).eval()
    moved(adapted)
    return adapted


def pair(name: str) -> tuple[bone_fx.AdaptedModule, Any]:
    """A model under one adapter with default targets, here and under PEFT."""
    mine = copy.deepcopy(_captured(name))
    other = in_peft(MODELS[name][0](), config(name)).eval()
    give(other, mine)
    return mine, other


def output(module: Any, name: str) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(**inputs(name))[0]
    return result


@models()
def test_outputs_folds_and_the_base(name: str, tmp_path: Path) -> None:
    mine, other = pair(name)
    expected, plain = output(mine, name), output(mine.get_base_model(), name)
    close(expected, output(other, name))
    assert (expected - plain).abs().max() > 1e-4
    mine.merge_adapter(safe_merge=True)
    close(output(mine, name), expected, atol=1e-5)
    mine.unmerge_adapter()
    close(output(mine, name), expected, atol=0)
    folded = mine.merge_and_unload()
    close(output(folded, name), expected, atol=1e-5)
    folded.save_pretrained(tmp_path)
    close(output(type(folded).from_pretrained(tmp_path).eval(), name), expected, atol=1e-5)
    close(output(mine.unload(), name), plain)
    assert len(mine.unload().state_dict()) == len(mine.get_base_model().state_dict())
    state = bone_fx.get_base_model_state_dict(mine)
    close(state, dict(mine.get_base_model().state_dict()), atol=0)


@models()
def test_two_adapters_and_their_files(name: str, tmp_path: Path) -> None:
    mine, _ = pair(name)
    first = output(mine, name)
    mine.add_adapter("second", config(name))
    mine.set_adapter("second")
    moved(mine, "second")
    second = output(mine, name)
    assert (first - second).abs().max() > 1e-4
    for adapter, expected in (("default", first), ("second", second)):
        folded = mine.merge_and_unload(adapter_names=[adapter])
        close(output(folded, name), expected, atol=1e-5)
    mine.save_pretrained(tmp_path)
    for pickled in (False, True):
        mine.save_pretrained(tmp_path, safe_serialization=not pickled)
        theirs = peft_load(MODELS[name][0](), tmp_path / "second")
        close(output(theirs, name), second)
    mine.save_pretrained(tmp_path)
    again = bone_fx.PeftModel.from_pretrained(MODELS[name][0](), tmp_path)
    close(output(again, name), first, atol=0)
    again.load_adapter(tmp_path / "second", "second")
    assert again.state_dict().keys() == mine.state_dict().keys()
    with pytest.warns(UserWarning, match="'default' is active"):
        mine.delete_adapter("second")
    close(output(mine, name), first, atol=0)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # PEFT asks for it
@models()
def test_gradients_with_and_without_checkpointing(name: str) -> None:
    mine, other = pair(name)
    reached = []
    for module in (mine, other, mine):
        if module is mine and reached:
            mine.prepare_model_for_gradient_checkpointing(mine)
            mine.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        module.zero_grad()
        module.train()(**inputs(name))[0].square().sum().backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None and p.grad.any()]
        assert len(gradients) == sum(p.requires_grad for p in module.parameters())
        reached.append(training(module))
    assert reached[0] == reached[1] == reached[2]
    with pytest.raises(UsageError, match="use_reentrant=False"):
        mine.gradient_checkpointing_enable({"use_reentrant": True})


@models("decoder", "seq2seq")
def test_generation_with_adapters_on_and_off(name: str) -> None:
    mine, _ = pair(name)

    def scores(module: Any) -> Tensor:
        options = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 3}
        result: Tensor = module.generate(**inputs(name), **options).scores[0]
        return result

    plain, adapted = scores(mine.get_base_model()), scores(mine)
    assert (plain - adapted).abs().max() > 1e-4
    with mine.disable_adapter():
        close(scores(mine), plain)
    close(scores(mine), adapted, atol=0)
    assert mine.generate(IDS, max_new_tokens=2).shape[0] == 2  # by position, seq2seq too


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_a_decoder(dtype: torch.dtype) -> None:
    base = MODELS["decoder"][0]().to(dtype)
    other = in_peft(copy.deepcopy(base), config("decoder")).eval()
    mine = bone_fx.get_peft_model(base, config("decoder")).eval()
    moved(mine)
    give(other, mine)
    expected = output(other, "decoder")
    near = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    close(output(mine, "decoder"), expected, atol=near)
    close(output(mine.merge_and_unload(), "decoder"), expected, atol=near)
    ids = torch.tensor([[1, 1, 1], [2, 1, 2]])
    assert mine.generate(input_ids=ids, attention_mask=MASK, max_new_tokens=3).shape == (2, 6)


@pytest.mark.slow
@models("decoder", "encoder")
def test_embeddings_as_inputs(name: str) -> None:
    mine, other = pair(name)
    outputs = [
        module(inputs_embeds=module.get_input_embeddings()(IDS))[0] for module in (mine, other)
    ]
    close(outputs[0], outputs[1])


@models()
def test_embeddings_of_a_frozen_base(name: str) -> None:
    mine, _ = pair(name)
    assert not mine.get_input_embeddings()(IDS).requires_grad
    assert not any(p.requires_grad for n, p in mine.named_parameters() if "embed" in n)


def test_some_layers_of_the_model() -> None:
    base, count = copy.deepcopy(_captured("decoder")), []
    for layers in (None, [0]):
        mine = copy.deepcopy(base)
        targets = ["q_proj", "v_proj"]
        mine.add_adapter(
            "one", config("decoder", target_modules=targets, layers_to_transform=layers)
        )
        mine.set_adapter("one")
        mine.train()(**inputs("decoder"))[0].sum().backward()
        count.append(sum(p.grad is not None for p in mine.parameters()))
    assert count == [4, 2]


@pytest.mark.slow
def test_a_classifier_has_a_loss_and_trains_its_head() -> None:
    mine, other = pair("classifier")
    labels = torch.tensor([0, 1])
    assert {"classifier.weight", "classifier.bias"} <= training(mine)
    assert training(mine) == training(other)
    losses = [module(**inputs("classifier"), labels=labels).loss for module in (mine, other)]
    close(losses[0], losses[1])


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing", "ignore:Could not find a config file"
)  # PEFT asks for both
def test_the_card_has_the_tags_of_the_base(tmp_path: Path) -> None:
    heads = []
    for name, make in (("mine", bone_fx.get_peft_model), ("other", in_peft)):
        base = llama()
        base.add_model_tags(["tag1", "tag2"])
        base.config._name_or_path = base.name_or_path = "me/a-base"
        make(base, peft.MissConfig(r=2)).save_pretrained(tmp_path / name)
        heads.append((tmp_path / name / "README.md").read_text().split("---")[1])
    assert heads[0] == heads[1]
    for tag in ("transformers", "base_model:adapter:me/a-base", "tag1", "tag2"):
        assert f"- {tag}" in heads[0]
    assert "lora" not in heads[0]


OTHERS: dict[str, dict[str, Any]] = {
    "OPTForCausalLM": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "BloomForCausalLM": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPTNeoForCausalLM": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
    },
    "GPTJForCausalLM": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
    "GPTBigCodeForCausalLM": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "Qwen2ForCausalLM": {**SIZES, "num_key_value_heads": 2},
    "Gemma3ForCausalLM": {**SIZES, "num_key_value_heads": 2, "head_dim": 8},
    "RobertaModel": {**SIZES, "max_position_embeddings": 40},
    "DebertaModel": {**SIZES, "pos_att_type": ["c2p", "p2c"], "relative_attention": True},
    "DebertaV2Model": SIZES,
    "BartForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    },
    "RobertaForSequenceClassification": {**SIZES, "max_position_embeddings": 40},
    "LlamaForSequenceClassification": {**SIZES, "pad_token_id": 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_models_of_pefts_suites(name: str) -> None:
    given = peft.MissConfig(
        r=2,
        init_weights=False,
        task_type="SEQ_CLS" if "Classification" in name else None,
    )
    other = in_peft(of(name, OTHERS[name]), copy.deepcopy(given)).eval()
    mine = bone_fx.get_peft_model(of(name, OTHERS[name]), given).eval()
    moved(mine)
    give(other, mine)
    more = {"decoder_input_ids": IDS} if name.startswith("Bart") else {}
    batch = {"input_ids": IDS + 2, "attention_mask": torch.ones_like(MASK), **more}
    expected = other(**batch)[0]
    close(mine(**batch)[0], expected, atol=1e-5)
    close(mine.merge_and_unload()(**batch)[0], expected, atol=1e-5)
    reached = []
    for module in (mine, other):
        module(**batch)[0].square().sum().backward()
        reached.append(training(module))
        assert all((p.grad is not None) is p.requires_grad for p in module.parameters())
    assert reached[0] == reached[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Could not find a config file", "ignore::DeprecationWarning")
@pytest.mark.parametrize("init_weights", [True, "bat", "mini"])
def test_a_trainer_compiles_the_module(init_weights: Any, tmp_path: Path) -> None:
    torch._dynamo.reset()
    given = config("decoder", init_weights=init_weights, mini_r=2 if init_weights == "mini" else 1)
    mine = bone_fx.get_peft_model(MODELS["decoder"][0](), given)
    before = output(mine.eval(), "decoder")
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        torch_compile=True,
        torch_compile_backend="aot_eager",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(48).view(6, 8)]
    trainer = transformers.Trainer(mine.train(), arguments, train_dataset=rows)
    trainer.train()
    after = output(mine.eval(), "decoder")
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4
    mine.save_pretrained(tmp_path)
    again = bone_fx.PeftModel.from_pretrained(MODELS["decoder"][0](), tmp_path)
    close(output(again, "decoder"), after)
    assert torch.equal(again.generate(IDS, max_new_tokens=4), mine.generate(IDS, max_new_tokens=4))
