"""An adapter's tokenizer, template and end token reach the exported and the folded folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import bone_fx
from bone_fx.base.loading import open_base
from bone_fx.base.real_model import load_model
from bone_fx.errors import AdapterError, BaseModelError, InputRefusedError
from tests.deploy.test_companions import PLAIN, VOCABULARY, tokenizer
from tests.end_to_end.tiny import tiny_adapter, tiny_base

pytestmark = pytest.mark.filterwarnings("ignore:.*adapter config keys.*")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A base and an adapter that brings a tokenizer with named templates and an end of its own."""
    tiny_base(tmp_path / "base", eos_token_id=2)
    tokenizer(tmp_path / "base", template="the base's")
    tiny_adapter(tmp_path / "tuned")
    tokenizer(tmp_path / "tuned", "<end>", eos_token="<end>")
    config = tmp_path / "tuned" / "tokenizer_config.json"
    templates = [{"name": n, "template": t} for n, t in (("default", PLAIN), ("tools", "t"))]
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": templates}))
    return tmp_path


def test_genai_opens_the_adapters_tokenizer(folders: Path) -> None:
    og: Any = pytest.importorskip("onnxruntime_genai")
    result = bone_fx.export(
        folders / "base", adapters=[folders / "tuned"], output=folders / "out", verify="off"
    )
    assert "tokenizer: from adapter tuned" in result.manifest["notes"]
    assert any("padded on the right" in note for note in result.warnings)
    assert json.loads((folders / "out/genai_config.json").read_text())["model"]["eos_token_id"] == 7
    opened = og.Tokenizer(og.Model(str(folders / "out")))
    messages = json.dumps([{"role": "user", "content": "red"}])
    assert opened.apply_chat_template(messages, add_generation_prompt=False) == "red"
    assert list(opened.encode("red<end>")) == [6, 5, 7]
    files = result.manifest["adapters"][0]["files"]
    assert {"tokenizer.json", "tokenizer_config.json"} < set(files)
    assert {"config.json", "tokenizer.json"} < set(result.manifest["base"]["files"])


def test_a_folded_checkpoint_loads_with_them(folders: Path) -> None:
    result = bone_fx.fold_checkpoint(
        folders / "base", adapters=[folders / "tuned"], output=folders / "out"
    )
    assert "chat template: from adapter tuned" in result.warnings
    assert result.manifest["notes"] == list(result.warnings)
    loaded = AutoTokenizer.from_pretrained(folders / "out")
    assert loaded.chat_template == {"default": PLAIN, "tools": "t"}
    assert AutoConfig.from_pretrained(folders / "out").eos_token_id == 7
    model = AutoModelForCausalLM.from_pretrained(folders / "out")
    assert model.generation_config.eos_token_id == 7


def test_an_adapter_left_in_the_base_is_never_attached(folders: Path) -> None:
    base = folders / "base"
    before = load_file(base / "model.safetensors")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (base / name).write_bytes((folders / "tuned" / name).read_bytes())
    checkpoint = open_base(base)
    model = load_model(checkpoint, checkpoint.architecture, {}, {})
    assert not hasattr(model, "peft_config")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.get(name, value))
    result = bone_fx.fold_checkpoint(base, adapters=[folders / "tuned"], output=folders / "out")
    assert any("holds an adapter beside its weights" in note for note in result.warnings)
    assert not list((folders / "out").glob("adapter_*"))


def test_modules_of_a_sentence_model_travel(folders: Path) -> None:
    for name in ("1_Pooling", "2_Dense"):
        (folders / "base" / name).mkdir()
        (folders / "base" / name / "config.json").write_text("{}")
    (folders / "base" / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    modules = [
        {"path": name, "type": f"sentence_transformers.models.{name[2:] or 'Transformer'}"}
        for name in ("", "1_Pooling", "2_Dense")
    ]
    (folders / "base" / "modules.json").write_text(json.dumps(modules))
    bone_fx.fold_checkpoint(folders / "base", adapters=[folders / "tuned"], output=folders / "out")
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (folders / "out" / name).read_bytes() == (folders / "base" / name).read_bytes()


def test_an_encoder_says_what_is_left_to_the_caller(tmp_path: Path) -> None:
    base = tmp_path / "base"
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3}
    BertModel(BertConfig(vocab_size=60, num_hidden_layers=1, **sizes)).save_pretrained(base)
    tokenizer(base)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "modeling_own.py").write_text("raise SystemExit")
    notes = bone_fx.export(base, output=tmp_path / "out", verify="off").manifest["notes"]
    for part in ("Pooling (mean)", "token_type_ids is not among", "modeling_own.py"):
        assert sum(part in note for note in notes) == 1
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(VOCABULARY)
    assert AutoConfig.from_pretrained(tmp_path / "out").architectures == ["BertModel"]


def test_refusals_say_what_to_do(folders: Path) -> None:
    with pytest.raises(BaseModelError, match=r"is an adapter.*\n.*\n.*--adapter .*tuned"):
        bone_fx.export(folders / "tuned", output=folders / "out")
    more = [f"<{number}>" for number in range(130)]
    tokenizer(folders / "tuned", *more)
    for run in (bone_fx.export, bone_fx.fold_checkpoint):
        with pytest.raises(AdapterError, match="tokens that the model has not"):
            run(folders / "base", adapters=[folders / "tuned"], output=folders / "out")
    assert not (folders / "out").exists()


def test_a_tokenizer_that_transformers_does_not_load_is_refused(folders: Path) -> None:
    (folders / "base" / "special_tokens_map.json").write_text("[1]")
    with pytest.raises(InputRefusedError, match="does not load the tokenizer"):
        bone_fx.export(folders / "base", output=folders / "out", verify="fast")
    assert not (folders / "out").exists()
