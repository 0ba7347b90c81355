"""What goes beside a model's weights: whose tokenizer, whose chat template, whose settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from bone_fx.adapter_folder import AdapterFolder
from bone_fx.base.gguf import LAYOUT
from bone_fx.base.loading import open_base
from bone_fx.config import BoneConfig
from bone_fx.deploy.companions.choice import Companions, choose_companions
from bone_fx.deploy.companions.copying import copy_companions, copy_for_genai
from bone_fx.deploy.companions.left_out import files_left_out, sentence_notes
from bone_fx.errors import AdapterError, InputRefusedError
from tests.capture.decoder.decoders import DECODERS

VOCABULARY = ["<pad>", "<s>", "</s>", "e", "d", "ed", "r"]
PLAIN = "{{ messages[0]['content'] }}"


def tokenizer(folder: Path, *more: str, template: str | None = None, **special: str) -> Any:
    """A tokenizer of a few letters, saved as transformers saves it."""
    ids = {token: number for number, token in enumerate(VOCABULARY)}
    raw = Tokenizer(models.BPE(ids, [("e", "d")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", pad_token="<pad>")
    made.add_tokens(list(more), special_tokens=True)
    for name, token in special.items():
        setattr(made, name, token)
    made.chat_template = template
    made.save_pretrained(folder)
    return made


def adapter(folder: Path) -> tuple[str, AdapterFolder]:
    folder.mkdir(exist_ok=True)
    return folder.name, AdapterFolder(folder, BoneConfig(r=8, target_modules=["q_proj"]), {}, {})


def copied(companions: Companions, folder: Path) -> Any:
    folder.mkdir()
    copy_companions(companions, folder)
    return AutoTokenizer.from_pretrained(folder)


def test_the_last_adapter_that_brings_a_tokenizer_wins(tmp_path: Path) -> None:
    tokenizer(tmp_path / "base", template=PLAIN)
    tokenizer(tmp_path / "first", "<a>", template="first")
    last = tokenizer(tmp_path / "last", "<b>", "<c>", template="last")
    folders = [adapter(tmp_path / name) for name in ("first", "last", "bare")]
    chosen = choose_companions(tmp_path / "base", folders)
    assert "tokenizer: from adapter last" in chosen.notes
    assert "chat template: from adapter last" in chosen.notes
    got = copied(chosen, tmp_path / "out")
    assert got.chat_template == "last"
    assert got("red<c>e")["input_ids"] == last("red<c>e")["input_ids"] == [6, 5, 8, 3]


def test_files_that_only_the_base_has_do_not_mix_with_an_adapters_tokenizer(tmp_path: Path) -> None:
    tokenizer(tmp_path / "base", template=PLAIN)
    (tmp_path / "base" / "added_tokens.json").write_text(json.dumps({"<old>": 7}))
    tokenizer(tmp_path / "tuned", "<new>")
    chosen = choose_companions(tmp_path / "base", [adapter(tmp_path / "tuned")])
    assert "added_tokens.json" not in chosen.tokenizer
    got = copied(chosen, tmp_path / "out")
    assert (got.convert_tokens_to_ids("<new>"), got.chat_template) == (7, PLAIN)
    assert any("the base's, as adapter tuned brings none" in note for note in chosen.notes)


def test_a_template_alone_replaces_the_bases(tmp_path: Path) -> None:
    tokenizer(tmp_path / "base")
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "old"}))
    entry = adapter(tmp_path / "tuned")
    (tmp_path / "tuned" / "chat_template.jinja").write_text("new")
    chosen = choose_companions(tmp_path / "base", [entry])
    assert chosen.notes == ("chat template: from adapter tuned",)
    assert copied(chosen, tmp_path / "out").chat_template == "new"
    assert "old" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


def test_the_end_token_of_an_adapters_tokenizer_ends_texts(tmp_path: Path) -> None:
    tokenizer(tmp_path / "base")
    generation = {"eos_token_id": [2], "temperature": 0.7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    tokenizer(tmp_path / "tuned", "<end>", eos_token="<end>", pad_token="<end>")
    tuned = adapter(tmp_path / "tuned")
    config = LlamaConfig(eos_token_id=2, pad_token_id=0)
    chosen = choose_companions(tmp_path / "base", [tuned])
    settings, changed = chosen.generation_settings(config)
    assert changed == {"eos_token_id": 7, "pad_token_id": 7}
    assert settings == {"eos_token_id": 7, "pad_token_id": 7, "temperature": 0.7}
    assert "adapter tuned" in chosen.token_notes(changed)[0]

    own = {"eos_token_id": [2, 6]}  # an adapter's generation settings say more than its tokenizer
    (tmp_path / "tuned" / "generation_config.json").write_text(json.dumps(own))
    settings, _ = choose_companions(tmp_path / "base", [tuned]).generation_settings(config)
    assert settings["eos_token_id"] == [2, 6]


def test_an_equal_tokenizer_changes_no_token(tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        tokenizer(tmp_path / name)
    chosen = choose_companions(tmp_path / "base", [adapter(tmp_path / "tuned")])
    config = LlamaConfig(eos_token_id=[5, 6], pad_token_id=None)
    assert chosen.generation_settings(config) == ({}, {})


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer(tmp_path / "base")
    tokenizer(tmp_path / "tuned", "<a>", "<b>")
    model = next(row for row in DECODERS if row.name == "llama").build()
    chosen = choose_companions(tmp_path / "base", [adapter(tmp_path / "tuned")])
    chosen.check_vocabulary(model)
    model.resize_token_embeddings(8, mean_resizing=False)
    with pytest.raises(AdapterError, match="tokens that the model has not") as refused:
        chosen.check_vocabulary(model)
    assert "'<b>' with id 8" in str(refused.value)
    choose_companions(tmp_path / "base").check_vocabulary(model)


@pytest.mark.parametrize("named", [True, False])
def test_lists_of_templates_become_files(named: bool, tmp_path: Path) -> None:
    base = GPT2LMHeadModel(small_gpt2())
    base.save_pretrained(tmp_path / "base")
    tokenizer(tmp_path / "base")
    templates = [{"name": "tool_use", "template": "tools"}]
    if named:
        templates.append({"name": "default", "template": PLAIN})
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": templates}))
    before = AutoTokenizer.from_pretrained(tmp_path / "base").chat_template
    (tmp_path / "out").mkdir()
    checkpoint = open_base(tmp_path / "base")
    notes = copy_for_genai(choose_companions(tmp_path / "base"), checkpoint, tmp_path / "out")
    assert "chat_template" not in json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == before
    assert (tmp_path / "out" / "chat_template.jinja").is_file() == named
    assert bool(notes) != named
    assert named or "only tool_use" in notes[0]


@pytest.mark.parametrize(
    "templates", [3, ["x"], [{"name": "../../x", "template": "y"}], [{"name": "default"}]]
)
def test_templates_of_another_form_are_refused(templates: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    with pytest.raises(InputRefusedError, match="chat_template in"):
        choose_companions(tmp_path)


def small_gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)


def test_older_tokenizer_files_are_converted(tmp_path: Path) -> None:
    base = tmp_path / "base"
    GPT2LMHeadModel(small_gpt2()).save_pretrained(base)
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
    (base / "vocab.json").write_text(json.dumps(vocabulary))
    (base / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "out").mkdir()
    notes = copy_for_genai(choose_companions(base), open_base(base), tmp_path / "out")
    assert notes[0].startswith("tokenizer.json: converted from vocab.json")
    converted = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert converted.encode("abba").ids == [3, 2, 1]
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_a_tokenizer_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    GPT2LMHeadModel(small_gpt2()).save_pretrained(base)
    (base / "tokenizer.model").write_bytes(b"no sentencepiece")
    (tmp_path / "out").mkdir()
    notes = copy_for_genai(choose_companions(base), open_base(base), tmp_path / "out")
    assert "tokenizer.model and no tokenizer.json" in notes[0]
    assert "not converted" in notes[0]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["tokenizer.model"]


def test_the_base_is_called_by_what_was_given_and_not_by_its_place_in_a_cache(
    tmp_path: Path,
) -> None:
    cached = tmp_path / f"{LAYOUT}-0123"
    GPT2LMHeadModel(small_gpt2()).save_pretrained(cached)
    checkpoint = replace(open_base(cached), origin="models/given.gguf")
    (tmp_path / "out").mkdir()
    [note] = copy_for_genai(choose_companions(cached), checkpoint, tmp_path / "out")
    assert note.startswith("given.gguf has no tokenizer.json")
    (cached / "tokenizer.model").write_bytes(b"no sentencepiece")
    (cached / "own.py").touch()
    notes = copy_for_genai(choose_companions(cached), checkpoint, tmp_path / "out")
    notes += files_left_out(checkpoint, [])
    assert [note.partition(" ")[0] for note in notes] == ["given.gguf"] * 2


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    base = tmp_path / "base"
    GPT2LMHeadModel(small_gpt2()).save_pretrained(base)
    entry = adapter(tmp_path / "tuned")
    assert files_left_out(open_base(base), [entry]) == []
    assert sentence_notes(base, [entry]) == []
    (base / "adapter_config.json").write_text("{}")
    (base / "modeling_own.py").write_text("raise SystemExit")
    (base / "quantize_config.json").write_text("{}")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "tuned" / "config.json").write_text(json.dumps({**config, "n_positions": 7}))
    notes = files_left_out(open_base(base), [entry])
    for part in ("holds an adapter", "modeling_own.py", "quantize_config.json", "n_positions"):
        assert sum(part in note for note in notes) == 1
    assert not any(
        "modeling_own" in n for n in files_left_out(open_base(base, trust_remote_code=True), [])
    )


def test_pooling_and_norm_of_sentence_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [
        {"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"name": "2", "path": "../up", "type": "sentence_transformers.models.Normalize"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 50}))
    (note,) = sentence_notes(tmp_path, [])
    assert "Pooling (mean_tokens), Normalize" in note
    assert "50 tokens" in note
    (of_decoder,) = sentence_notes(tmp_path, [], decodes=True)
    assert "such as last_hidden_state" in note
    assert "no last_hidden_state that could be pooled" in of_decoder


def test_settings_of_sentence_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    pooling = {"pooling_mode_lasttoken": True, "include_prompt": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}, {"path": ""}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    settings = {"truncate_dim": 64, "activation_fn": "torch.nn.modules.activation.Sigmoid"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))
    (note,) = sentence_notes(tmp_path, [])
    for part in (
        "Pooling (lasttoken, without the prompt's tokens), a module of no type",
        "cut to 64 values",
        "Sigmoid of the scores",
    ):
        assert part in note


@pytest.mark.parametrize("content", ["{}", '["Pooling"]', "null"])
def test_modules_that_are_no_list_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(InputRefusedError, match=r"modules\.json cannot be read"):
        sentence_notes(tmp_path, [])
