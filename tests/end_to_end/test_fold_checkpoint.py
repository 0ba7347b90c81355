"""A checkpoint with adapters folded in is what PEFT merges, and a checkpoint like its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
)

import bone_fx
from bone_fx.deploy.changed_tensors import ChangedTensors
from bone_fx.errors import AdapterError, SiteError, UsageError, VerificationError
from bone_fx.weights.writing import safetensors_writer
from tests.command import run
from tests.end_to_end.test_peft import METHODS, TARGETS, in_peft, llama


def checkpoint(folder: Path, dtype: torch.dtype, *, shard: str = "12KB") -> LlamaForCausalLM:
    model = llama().to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return model


def adapter_of(folder: Path, model: Any, method: str, **more: Any) -> Any:
    wrapped: Any = in_peft(model, METHODS[method], target_modules=TARGETS, **more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "bone_" in name or "miss_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


@pytest.mark.parametrize("method", METHODS)
def test_equals_peft(method: str, tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    wrapped = adapter_of(adapter, checkpoint(base, torch.float32), method, task_type="CAUSAL_LM")
    result = bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    merged = wrapped.merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(out)
    for name, expected in merged.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], expected, rtol=0, atol=2e-7)
    assert len(result.folded) == len(TARGETS) * 2


OURS = ("README.md", "bone_export.json", "report.html")


def test_keeps_the_layout_of_its_base(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = checkpoint(base, torch.bfloat16)
    adapter_of(adapter, model, "bone", task_type="CAUSAL_LM")
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    names = sorted(path.name for path in base.iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, *OURS])
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        assert list(before) == list(after)
        assert all(after[name].dtype == torch.bfloat16 for name in after)
        for name in before:
            changed = any(f"{target}.weight" in name for target in TARGETS)
            assert torch.equal(before[name], after[name]) != changed
    index = "model.safetensors.index.json"
    assert json.loads((base / index).read_text()) == json.loads((out / index).read_text())


def test_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    adapter_of(adapter, checkpoint(base, torch.float16), "bat", task_type="CAUSAL_LM")
    manifests = [
        bone_fx.fold_checkpoint(base, adapters=[adapter], output=tmp_path / name).manifest
        for name in ("one", "two")
    ]
    assert manifests[0] == manifests[1]
    for path in (tmp_path / "one").iterdir():
        if path.name == "report.html":  # it holds times
            continue
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_trained_head_comes_along(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = BertConfig(vocab_size=50, num_hidden_layers=2, num_labels=3, **sizes)
    model = BertForSequenceClassification(config)
    model.bert.save_pretrained(tmp_path / "base")
    wrapped: Any = in_peft(
        model,
        METHODS["bone"],
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    bone_fx.fold_checkpoint(
        tmp_path / "base", adapters=[tmp_path / "adapter"], output=tmp_path / "out"
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        expected = wrapped.merge_and_unload().eval()(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-6)


def test_a_head_that_overflows_is_told(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    wrapped = adapter_of(
        adapter,
        checkpoint(base, torch.float16).float(),
        "bone",
        modules_to_save=["lm_head"],
        task_type="CAUSAL_LM",
    )
    saved = wrapped.get_output_embeddings().modules_to_save["default"].weight
    with torch.no_grad():
        saved[3, 4] = 1e5
    wrapped.save_pretrained(adapter, save_embedding_layers=False)
    with pytest.raises(VerificationError, match=r"1 values of 'lm_head\.weight' overflow"):
        bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert not out.exists()


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = checkpoint(base, torch.float32)
    adapter_of(adapter, model, "bone", task_type="CAUSAL_LM")
    with pytest.raises(UsageError, match="nothing to fold"):
        bone_fx.fold_checkpoint(base, adapters=[], output=out)
    with pytest.raises(UsageError, match="overlaps"):
        bone_fx.fold_checkpoint(base, adapters=[adapter], output=base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for wrong in ({"modules_to_save": ["("]}, {"layers_to_transform": 0, "layers_pattern": "(("}):
        (adapter / "adapter_config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(SiteError, match="not a regular expression"):
            bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 7}))
    with pytest.raises(AdapterError):
        bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert not out.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_wrong_byte_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bone_fx.deploy import fold_checkpoint as folding

    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    adapter_of(adapter, checkpoint(base, torch.float32), "bone", task_type="CAUSAL_LM")

    def damaged(path: Path, *arguments: Any) -> str:
        digest = safetensors_writer.write_safetensors(path, *arguments)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return digest

    monkeypatch.setattr(folding, "write_safetensors", damaged)
    with pytest.raises(VerificationError, match="not the folded one"):
        bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert not out.exists()
    assert (tmp_path / "out.rejected").exists()


@pytest.mark.parametrize("method", METHODS)
def test_float64_is_folded_in_float64(method: str, tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    wrapped = adapter_of(adapter, checkpoint(base, torch.float32), method, task_type="CAUSAL_LM")
    for path in base.glob("*.safetensors"):
        wide = {name: tensor.double() for name, tensor in load_file(path).items()}
        save_file(wide, path, metadata={"format": "pt"})
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    merged = wrapped.double().merge_and_unload().state_dict()
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-15)


def test_shards_of_one_name_in_folders(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    model = checkpoint(base, torch.float32)
    adapter_of(adapter, model, "bone", task_type="CAUSAL_LM")
    index = base / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    moved = {name: f"part-{i}/weights.safetensors" for i, name in enumerate({*places.values()})}
    for name, place in moved.items():
        (base / place).parent.mkdir()
        (base / name).rename(base / place)
    index.write_text(json.dumps({"weight_map": {k: moved[name] for k, name in places.items()}}))
    result = bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert len(moved) > 2
    weights = [name for name in result.manifest["files"] if name.endswith(".safetensors")]
    assert sorted(weights) == sorted(moved.values())
    assert set(result.manifest["base"]["files"]) >= set(moved.values())
    written = {key for place in moved.values() for key in load_file(out / place)}
    assert written == set(places)


def test_a_name_that_transformers_does_not_read_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bone_fx.deploy import fold_checkpoint as folding

    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    config = {"modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    adapter_of(adapter, checkpoint(base, torch.float32, shard="5GB"), "bone", **config)
    real = folding.changed_tensors

    def misnamed(*arguments: Any) -> ChangedTensors:
        changes = real(*arguments)
        recipes = dict(changes.recipes)
        recipes["head.weight"] = recipes.pop("lm_head.weight")
        return ChangedTensors(recipes, {**changes.keys, "lm_head.weight": "head.weight"})

    monkeypatch.setattr(folding, "changed_tensors", misnamed)
    with pytest.raises(VerificationError, match=r"does not load what was written for lm_head"):
        bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert not out.exists()


def test_the_command(tmp_path: Path) -> None:
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    adapter_of(adapter, checkpoint(base, torch.float32), "mini", task_type="CAUSAL_LM")
    done = run("fold", base, "--adapter", adapter, "-o", out, "--json", "-q")
    assert done.returncode == 0
    assert json.loads(done.stdout)["kind"] == "checkpoint"
    done = run("fold", base, "--adapter", adapter, "-o", out)
    assert done.returncode == 2
    assert "exists" in done.stderr
    done = run("fold", "--help")
    assert done.returncode == 0
    assert "--adapter" in done.stdout
    other = tmp_path / "other"
    assert run("fold", "--adapter", adapter, base, "-o", other, "-q").returncode == 0
    assert other.is_dir()
    done = run("fold", "-o", tmp_path / "third")
    assert done.returncode == 2
    assert "bone-export fold --help" in done.stderr
