"""Embeddings and heads that adapters bring, against PEFT's own unmerged forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import bone_fx
from bone_fx.errors import AdapterError, FoldError
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.tiers import slow

# PEFT 0.18 warns of its own end and of transformers' names of today.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
IDS = torch.tensor([[5, 60, 42, 7, 88]])
BOTH = ["embed_tokens", "lm_head"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "vocab_size": 99,
}


def train(model: Any, folder: Path, targets: list[str], **fields: Any) -> None:
    """Write an adapter whose blocks and trained copies have values of their own."""
    config = peft.BoneConfig(r=16, target_modules=targets, init_weights=False, **fields)
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "bone_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    wrapped.save_pretrained(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=IDS).logits
    return result


def resized(base: Path, rows: int) -> LlamaForCausalLM:
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(base)
    if rows != model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def of_graph(folder: Path) -> Tensor:
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        else:
            feeds[value.name] = (IDS if value.name == "input_ids" else torch.ones_like(IDS)).numpy()
    return torch.from_numpy(session.run(["logits"], feeds)[0])


ROWS: list[tuple[bool, int, list[str] | None, list[str]]] = [
    (True, 128, BOTH, ["q_proj"]),
    (True, 128, ["lm_head"], ["q_proj"]),
    (True, 128, ["embed_tokens"], ["q_proj"]),
    (True, 128, None, ["q_proj", "lm_head"]),
    (True, 131, None, ["q_proj"]),
    (True, 131, None, ["q_proj", "lm_head"]),
    (True, 90, ["embed_tokens"], ["q_proj", "lm_head"]),
    (False, 128, None, ["q_proj", "lm_head"]),
    (False, 131, ["lm_head"], ["q_proj"]),
    (False, 90, None, ["q_proj"]),
]


def trained(
    folder: Path, tied: bool, rows: int, saved: list[str] | None, targets: list[str]
) -> tuple[Path, Path, Path]:
    """A base, an adapter that PEFT trained on it, resized, and where an output may go."""
    base, adapter = folder / "base", folder / "adapter"
    tiny_base(base, tie_word_embeddings=tied)
    fields = {"modules_to_save": saved, "task_type": "CAUSAL_LM"}
    train(resized(base, rows), adapter, targets, **fields)
    return base, adapter, folder / "out"


@pytest.mark.parametrize(("tied", "rows", "saved", "targets"), ROWS)
def test_a_fold_is_what_peft_runs(
    tied: bool, rows: int, saved: list[str] | None, targets: list[str], tmp_path: Path
) -> None:
    base, adapter, out = trained(tmp_path, tied, rows, saved, targets)
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    folded, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert folded.config.vocab_size == rows
    apart = saved is not None or "lm_head" in targets
    assert folded.config.tie_word_embeddings == (tied and not apart)
    expected = logits(PeftModel.from_pretrained(resized(base, rows), adapter))
    torch.testing.assert_close(logits(folded), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("tied", "rows", "saved", "targets"), [ROWS[5], *slow(ROWS[1], ROWS[8])])
def test_an_export_is_what_peft_runs(
    tied: bool, rows: int, saved: list[str] | None, targets: list[str], tmp_path: Path
) -> None:
    base, adapter, out = trained(tmp_path, tied, rows, saved, targets)
    bone_fx.export(base, adapters=[adapter], output=out, verify="fast")
    assert json.loads((out / "genai_config.json").read_text())["model"]["vocab_size"] == rows
    expected = logits(PeftModel.from_pretrained(resized(base, rows), adapter))
    torch.testing.assert_close(of_graph(out), expected, rtol=0, atol=2e-5)


def test_names_of_a_base_without_its_prefix(tmp_path: Path) -> None:
    """The base was saved as a body, the classifier reads `roberta.…`, and a table was trained."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    RobertaModel(RobertaConfig(**SIZES), add_pooling_layer=False).save_pretrained(base)
    load = RobertaForSequenceClassification.from_pretrained
    saved = ["word_embeddings", "classifier"]
    train(load(base), adapter, ["query"], task_type="SEQ_CLS", modules_to_save=saved)
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert not [key for key in load_file(out / "model.safetensors") if key.startswith("roberta.")]
    folded, report = load(out, output_loading_info=True)
    assert not any(report.values())
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    torch.testing.assert_close(logits(folded), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("saved", ["cls", "word_embeddings"])
def test_a_masked_head_that_ties_its_bias_too(saved: str, tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(base)
    load = BertForMaskedLM.from_pretrained
    train(load(base), adapter, ["query"], modules_to_save=[saved])
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    folded, report = load(out, output_loading_info=True)
    assert not any(report.values())
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    torch.testing.assert_close(logits(folded), expected, rtol=0, atol=1e-6)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_base(tmp_path / "base", tie_word_embeddings=False)


def adapter_with(folder: Path, tensors: dict[str, Tensor], **fields: Any) -> Path:
    """The tiny adapter, with more in its file."""
    tiny_adapter(folder, **fields)
    file = folder / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file({**load_file(file), **more}, file)
    return folder


def refused(base: Path, *adapters: Path, **options: Any) -> str:
    output = base.parent / "out"
    with pytest.raises(AdapterError) as caught:
        bone_fx.fold_checkpoint(base, adapters=adapters, output=output, **options)
    assert caught.value.exit_code == 3
    assert not output.exists()
    return str(caught.value)


def test_two_adapters_with_different_heads(base: Path) -> None:
    style, facts, same = (
        adapter_with(base.parent / name, {"lm_head.weight": value}, modules_to_save=["lm_head"])
        for name, value in (
            ("style", torch.ones(128, 48)),
            ("facts", torch.full((128, 48), 2.0)),
            ("same", torch.ones(128, 48)),
        )
    )
    assert "'style' and 'facts' bring different values of lm_head" in refused(base, style, facts)
    out = base.parent / "both"
    bone_fx.fold_checkpoint(base, adapters=[style, same], output=out)
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], torch.ones(128, 48))


def test_a_whole_weight_after_a_block(base: Path) -> None:
    """In the other order the block acts on the weight, as PEFT has it of a merged model."""
    blocks = tiny_adapter(base.parent / "blocks")
    site = "model.layers.1.self_attn.q_proj"
    name, weight = f"{site}.base_layer.weight", torch.ones(48, 48)
    whole = adapter_with(base.parent / "whole", {name: weight})
    with pytest.raises(AdapterError, match=rf"{site}\.weight whole.*'blocks' before it"):
        bone_fx.export(base, adapters=[blocks, whole], output=base.parent / "out")
    out = base.parent / "folded"
    bone_fx.fold_checkpoint(base, adapters=[whole, blocks], output=out)
    block = load_file(blocks / "adapter_model.safetensors")[f"base_model.model.{site}.bone_block"]
    folded = load_file(out / "model.safetensors")[f"{site}.weight"]
    assert torch.allclose(folded, weight + 2 * block.T.repeat(1, 3), atol=1e-5)


def test_a_head_that_the_file_lacks(base: Path) -> None:
    adapter = tiny_adapter(base.parent / "a", modules_to_save=["lm_head"])
    assert "its file does not hold lm_head.weight" in refused(base, adapter)
    fields = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    edited = tiny_adapter(base.parent / "b", **fields)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    assert "its file does not hold score.weight" in refused(base, edited)


def test_one_side_that_was_resized(base: Path) -> None:
    adapter = adapter_with(base.parent / "a", {"model.embed_tokens.weight": torch.ones(131, 48)})
    said = refused(base, adapter)
    assert "model.embed_tokens.weight with 131 rows" in said
    assert "lm_head.weight with 128 rows" in said


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.miss_block",
        "model.layers.0.mlp.down_proj.lora_A.weight",
        "model.layers.7.mlp.bias",
    ],
)
def test_a_tensor_that_means_nothing(name: str, base: Path) -> None:
    adapter = adapter_with(base.parent / "a", {name: torch.ones(16, 48)})
    said = refused(base, adapter)
    assert name in said
    assert "--allow-unused" in said
    result = bone_fx.fold_checkpoint(
        base, adapters=[adapter], output=base.parent / "out", allow_unused=[f"*{name}"]
    )
    assert any(name in note for note in result.manifest["notes"])


def test_what_is_given_up_is_no_part_of_the_reference(base: Path) -> None:
    """A plain weight of an adapted layer, which PEFT does not load, and a name of no layer."""
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.7.mlp.bias"]
    adapter = adapter_with(base.parent / "a", {name: torch.ones(48, 48) for name in names})
    assert names[0] in refused(base, adapter)
    patterns = ["*.q_proj.weight", "model.layers.7.*"]
    result = bone_fx.export(
        base, adapters=[adapter], output=base.parent / "out", allow_unused=patterns
    )
    assert any(all(name in note for name in names) for note in result.manifest["notes"])
    without = tiny_adapter(base.parent / "b")
    bone_fx.export(base, adapters=[without], output=base.parent / "same", verify="off")
    data = [(base.parent / out / "model.onnx.data").read_bytes() for out in ("out", "same")]
    assert data[0] == data[1]


def test_a_head_that_is_used_is_never_left_out(base: Path) -> None:
    head = {"lm_head.weight": torch.ones(128, 48)}
    adapter = adapter_with(base.parent / "a", head, modules_to_save=["lm_head"])
    out = base.parent / "out"
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out, allow_unused=["*"])
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], torch.ones(128, 48))


def test_what_peft_writes_twice_is_no_news(base: Path) -> None:
    """Blocks of other adapters, and second copies of trained modules."""
    twice = {
        "model.layers.0.mlp.up_proj.bone_block.other": torch.ones(16, 80),
        "lm_head.original_module.weight": torch.ones(128, 48),
        "lm_head.modules_to_save.weight": torch.ones(128, 48),
    }
    adapter = adapter_with(base.parent / "a", twice)
    plain = tiny_adapter(base.parent / "b")
    files = []
    for number, folder in enumerate((adapter, plain)):
        out = base.parent / f"out{number}"
        bone_fx.fold_checkpoint(base, adapters=[folder], output=out)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_head_of_integers(base: Path) -> None:
    codes = {"lm_head.weight": torch.ones(128, 48, dtype=torch.int64)}
    adapter = adapter_with(base.parent / "a", codes, modules_to_save=["lm_head"])
    assert "holds no floats" in refused(base, adapter)


def test_a_pair_whose_field_decides_more(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = T5Config(vocab_size=99, tie_word_embeddings=True, decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    train(model, tmp_path / "adapter", ["q"], modules_to_save=["lm_head"])
    with pytest.raises(FoldError, match="tie_word_embeddings also decides"):
        bone_fx.fold_checkpoint(
            tmp_path / "base", adapters=[tmp_path / "adapter"], output=tmp_path / "out"
        )


@pytest.mark.parametrize("labels", [None, 50])
def test_a_classifier_of_images_that_peft_noted(labels: int | None, tmp_path: Path) -> None:
    """An adapter without a task: the class and the number of labels are the adapter's."""
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    config = ViTConfig(
        **{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=16, patch_size=4
    )
    if labels is None:
        ViTModel(config).save_pretrained(base)
    else:
        config.num_labels = labels
        ViTForImageClassification(config).save_pretrained(base)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    model = ViTForImageClassification.from_pretrained(base, **options)
    targets = ["q_proj", "v_proj"]
    train(model, adapter, targets, modules_to_save=["classifier"])
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    folded = ViTForImageClassification.from_pretrained(out)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = ViTForImageClassification.from_pretrained(base, **options)
    with torch.no_grad():
        expected = PeftModel.from_pretrained(clean, adapter).eval()(pixel_values=pixels).logits
        found = folded.eval()(pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
