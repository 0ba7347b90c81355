"""What beside a graph tells other tools what the model is, as transformers reads it."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

import bone_fx
from bone_fx.errors import VerificationError
from bone_fx.verify.configuration import verify_configuration
from bone_fx.verify.parity import Parity
from bone_fx.weights.storage.safetensors_file import file_sha256
from tests.deploy.test_companions import tokenizer
from tests.end_to_end.test_heads import SIZES, train, trained
from tests.end_to_end.tiny import tiny_base
from tests.tiers import slow

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # PEFT 0.18 warns of its own end
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
LABELS = {0: "cat", 1: "dog", 2: "newt"}


def test_a_decoder_says_what_the_adapter_made_of_it(tmp_path: Path) -> None:
    """Grown vocabulary, untied head, dtype, and an end token that comes with the tokenizer."""
    base, adapter, out = trained(tmp_path, True, 131, ["lm_head"], ["q_proj"])
    tokenizer(base)
    tokenizer(adapter, "<end>", eos_token="<end>")
    GenerationConfig(temperature=0.7, do_sample=True, eos_token_id=2).save_pretrained(base)
    result = bone_fx.export(base, adapters=[adapter], output=out, dtype="fp16", verify="fast")
    folded = tmp_path / "folded"
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=folded)
    found, expected = AutoConfig.from_pretrained(out), AutoConfig.from_pretrained(folded)
    assert (found.vocab_size, found.tie_word_embeddings, found.eos_token_id) == (131, False, 7)
    others = {"dtype": None, "_name_or_path": None}
    assert {**found.to_dict(), **others} == {**expected.to_dict(), **others}
    assert str(found.dtype) == "torch.float16"
    settings = GenerationConfig.from_pretrained(out)
    assert settings == GenerationConfig.from_pretrained(folded)
    assert (settings.eos_token_id, settings.temperature) == (7, 0.7)
    assert {"config.json", "generation_config.json"} <= set(result.manifest["files"])
    assert "config.json" in result.manifest["verification"]["ran"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that brings no generation settings, with sentence-transformers' list; its export."""
    folder = tmp_path_factory.mktemp("plain")
    tiny_base(folder / "base", eos_token_id=[2, 5], bos_token_id=1)
    (folder / "base" / "generation_config.json").unlink()
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    (folder / "base" / "modules.json").write_text(json.dumps(modules))
    bone_fx.export(folder / "base", output=folder / "out", verify="off")
    return folder


def test_generation_settings_are_made_where_nobody_brings_any(plain: Path) -> None:
    settings = GenerationConfig.from_pretrained(plain / "out")
    assert (settings.eos_token_id, settings.bos_token_id) == ([2, 5], 1)


def test_a_decoder_has_no_states_to_pool(plain: Path) -> None:
    assert not (plain / "out" / "modules.json").exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 64, "vocab_size"),
        ("dtype", "float16", "dtype"),
        ("architectures", ["Other"], "architectures"),
        ("model_type", "lama", "transformers does not open it"),
    ],
)
def test_another_configuration_is_found(
    field: str, value: object, message: str, plain: Path, tmp_path: Path
) -> None:
    content = json.loads((plain / "out" / "config.json").read_text())
    expected = AutoConfig.from_pretrained(plain / "base")
    for changed in (False, True):
        content = {**content, **({field: value} if changed else {})}
        (tmp_path / "config.json").write_text(json.dumps(content))
        parity = Parity(1e-4)
        failure = pytest.raises(VerificationError, match=f"failed: config.json: {message}")
        with failure if changed else nullcontext():
            verify_configuration(parity, tmp_path, expected, "LlamaForCausalLM", "float32")
        assert bool(parity.cases) != changed


def test_another_end_of_texts_is_found(plain: Path, tmp_path: Path) -> None:
    """A folder whose files agree with its manifest, but not with its base."""
    out = shutil.copytree(plain / "out", tmp_path / "out")
    path, manifest = out / "generation_config.json", out / "bone_export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 9}))
    content = json.loads(manifest.read_text())
    content["files"][path.name]["sha256"] = file_sha256(path)
    manifest.write_text(json.dumps(content))
    with pytest.raises(VerificationError, match=r"generation_config.json: eos_token_id"):
        bone_fx.verify_export(out, base=plain / "base", verify="fast")


def test_a_folder_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    parity = Parity(1e-4)
    verify_configuration(parity, tmp_path, BertConfig(), "BertModel", "float32")
    assert list(parity.skipped) == ["config.json"]


@pytest.mark.parametrize("named", [True, *slow(False)])
def test_a_classifier_has_its_trained_labels(named: bool, tmp_path: Path) -> None:
    """Labels come from an adapter's config.json, where a label stands there for each class."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    RobertaModel(RobertaConfig(**SIZES, max_position_embeddings=40)).save_pretrained(base)
    names: Any = {"id2label": LABELS} if named else {"num_labels": 3}
    options = {**names, "problem_type": "multi_label_classification"}
    model = RobertaForSequenceClassification.from_pretrained(base, **options)
    train(model, adapter, ["query", "value"], task_type="SEQ_CLS")
    model.config.save_pretrained(adapter)
    if not named:
        path = adapter / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "id2label": {"0": "a"}}))
    result = bone_fx.export(base, adapters=[adapter], output=out, verify="fast" if named else "off")
    found = AutoConfig.from_pretrained(out)
    assert found.architectures == ["RobertaForSequenceClassification"]
    assert found.num_labels == 3
    assert found.id2label == (LABELS if named else {n: f"LABEL_{n}" for n in range(3)})
    assert found.label2id == {label: n for n, label in found.id2label.items()}
    assert found.problem_type == ("multi_label_classification" if named else None)
    assert any("names of the classes" in note for note in result.warnings) == named
    assert not any("is not used" in note for note in result.warnings)


def test_sentence_files_stand_where_the_graph_gives_states(tmp_path: Path) -> None:
    base = tmp_path / "base"
    BertModel(BertConfig(**SIZES)).save_pretrained(base)
    tokenizer(base)
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    modules = [
        {"path": name, "type": f"sentence_transformers.models.{kind}"}
        for name, kind in (("", "Transformer"), ("1_Pooling", "Pooling"))
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    result = bone_fx.export(base, output=tmp_path / "out", verify="fast")
    for name in ("modules.json", "1_Pooling/config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
        assert name in result.manifest["files"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 7
