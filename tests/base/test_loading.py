"""Opening bases and building skeletons, quickly and without weights."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bone_fx.base import loading
from bone_fx.base.loading import architecture_for_task, open_base, skeleton
from bone_fx.base.skeleton import skeleton_from_config
from bone_fx.errors import BaseModelError, InputRefusedError
from bone_fx.weights.load_plan import recipes_for
from tests.capture.architectures import BY_NAME
from tests.memory import PRINT_PEAK
from tests.weights.checkpoints import agree, all_tensors, edit_json, save

LARGE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}
"""A 70B Llama: 141 GB in bfloat16."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in one file."""
    save(BY_NAME["llama"], tmp_path / "base")
    return tmp_path / "base"


def mode_of(model: torch.nn.Module) -> FakeTensorMode:
    parameter = next(model.parameters())
    assert isinstance(parameter, FakeTensor)
    return parameter.fake_mode


def test_what_a_base_knows(folder: Path) -> None:
    base = open_base(folder)
    assert base.folder == folder
    assert base.architecture.__name__ == "LlamaForCausalLM"
    assert [file.name for file in base.files] == ["model.safetensors"]
    expected = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in base.files}
    assert base.sha256() == base.sha256() == expected
    assert set(base.tensors) > {"model.embed_tokens.weight"}
    assert open_base(str(folder)).tensors.keys() == base.tensors.keys()


def test_skeleton_has_no_weights_and_true_buffers(folder: Path) -> None:
    model, _ = skeleton(open_base(folder), torch.float16)
    assert not model.training
    mode = mode_of(model)
    for parameter in model.parameters():
        assert isinstance(parameter, FakeTensor)
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.fake_mode is mode
        assert (parameter.device.type, parameter.dtype, parameter.requires_grad) == (
            "cpu",
            torch.float16,
            False,
        )
    for buffer in model.buffers():
        assert not isinstance(buffer, FakeTensor)
        assert buffer.device.type == "cpu"
        assert buffer.isfinite().all()


def test_skeleton_runs_in_its_mode(folder: Path) -> None:
    model, _ = skeleton(open_base(folder), torch.float32)
    with mode_of(model), torch.no_grad():
        logits = model(input_ids=torch.zeros(2, 5, dtype=torch.long)).logits
    assert isinstance(logits, FakeTensor)
    assert logits.shape == (2, 5, 99)


def test_config_is_left_alone(folder: Path) -> None:
    base = open_base(folder)
    before = base.config.to_dict()
    model, _ = skeleton(
        base, torch.float16, config_overrides={"num_hidden_layers": 1}, attn_implementation="eager"
    )
    assert model.config.num_hidden_layers == 1
    assert model.config._attn_implementation == "eager"
    assert base.config.to_dict() == before


def test_building_leaves_parameters_elsewhere_alone(folder: Path) -> None:
    skeleton(open_base(folder), torch.float32)
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_rows_that_the_model_computes_itself(tmp_path: Path) -> None:
    """Marian computes sinusoids, which are parameters; ResNet saves statistics, buffers."""
    from transformers import MarianConfig, MarianMTModel, ResNetConfig, ResNetForImageClassification

    sizes = {
        "d_model": 32,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "encoder_layers": 1,
        "decoder_layers": 1,
    }
    heads = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 30,
    }
    tokens = {"vocab_size": 50, "pad_token_id": 49, "eos_token_id": 0, "decoder_start_token_id": 49}
    marian = MarianMTModel(MarianConfig(**sizes, **heads, **tokens))
    marian.save_pretrained(tmp_path / "marian")
    base = open_base(tmp_path / "marian")
    model, plan = skeleton(base, torch.float32)
    recipes = recipes_for(model, plan, base.tensors)
    expected = all_tensors(MarianMTModel.from_pretrained(tmp_path / "marian"))
    assert sorted(recipes) == sorted(expected)
    assert all(torch.equal(recipes[name].evaluate(), tensor) for name, tensor in expected.items())
    assert recipes["model.encoder.embed_positions.weight"].describe().startswith("computed")

    resnet = ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    )
    for buffer in resnet.buffers():
        buffer.copy_(torch.rand(buffer.shape) * 9)
    resnet.save_pretrained(tmp_path / "resnet")
    agree(tmp_path / "resnet", torch.float32)


def test_a_class_for_a_task(folder: Path) -> None:
    base = open_base(folder)
    assert architecture_for_task(base, None).__name__ == "LlamaForCausalLM"
    assert architecture_for_task(base, "SEQ_CLS").__name__ == "LlamaForSequenceClassification"
    with pytest.raises(InputRefusedError, match="SEQ_CLASS"):
        architecture_for_task(base, "SEQ_CLASS")
    with pytest.raises(BaseModelError, match="AutoModelForSeq2SeqLM"):
        architecture_for_task(base, "SEQ_2_SEQ_LM")


def test_without_architectures_it_is_the_plain_model(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=None)
    assert open_base(folder).architecture.__name__ == "LlamaModel"


@pytest.mark.slow
def test_large_model_needs_no_memory(tmp_path: Path) -> None:
    """A 70B Llama, 141 GB in bfloat16, opened and built in an address space of 8 GB."""
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    _write_sparse(tmp_path / "model.safetensors")
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30,) * 2)\n"
        "import torch\n"
        "from bone_fx.base.loading import open_base, skeleton\n"
        "from bone_fx.weights.load_plan import recipes_for\n"
        "base = open_base(sys.argv[1])\n"
        "model, plan = skeleton(base, torch.bfloat16)\n"
        "recipes = recipes_for(model, plan, base.tensors)\n"
        "print(len(recipes), sum(p.numel() for p in model.parameters()))\n"
        f"{PRINT_PEAK}"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, parameters, peak = map(int, done.stdout.split())
    assert count == 80 * 9 + 3 + 2
    assert parameters == pytest.approx(70.55e9, rel=1e-3)
    assert peak < 1.5 * 2**30


def _write_sparse(file: Path) -> None:
    """A checkpoint of the large model with holes for data."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shell = skeleton_from_config(LlamaConfig(**LARGE), torch.bfloat16, LlamaForCausalLM)
    header, end = {}, 0
    for name, parameter in shell.named_parameters():
        size = parameter.numel() * 2
        header[name] = {
            "dtype": "BF16",
            "shape": list(parameter.shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


def test_import_without_transformers() -> None:
    program = (
        "import sys, bone_fx.base.loading, bone_fx.weights.apply_adapters\n"
        "print('transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("BONE_FX_CACHE", raising=False)
    assert loading.cache_root() == Path("~/.cache/bone_fx").expanduser()
    monkeypatch.setenv("BONE_FX_CACHE", str(tmp_path))
    assert loading.cache_root() == tmp_path
    assert loading.cache_root("/x") == Path("/x")
