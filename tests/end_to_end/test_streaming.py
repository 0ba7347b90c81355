"""Memory does not grow with the weights: a checkpoint of 200 MB under a limit that it does not fit.

The limit is on the data that a process may allocate, counted from when everything is imported; a
tensor of 200 MB and what it is in float32 would take 600 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig

pytestmark = pytest.mark.slow

ROOM = 480 << 20
HIDDEN, VOCABULARY, R = 1024, 100_000, 16
PROGRAM = f"""
import resource, sys
import bone_fx, torch
from bone_fx.deploy import builds, fold_checkpoint
from bone_fx.onnx.aten import torchlib
from transformers import LlamaForCausalLM
import torch.export._trace
held = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status")
            if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (held + {ROOM}, held + {ROOM}))
base, adapter, output, how = sys.argv[1:]
if how == "fold":
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=output)
elif how == "whole":
    torch.zeros({VOCABULARY}, {HIDDEN}).add(1)
else:
    bone_fx.export(base, output=output, adapters=[adapter], dtype=how, provider="cuda",
                   verify="off")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama of one layer with a head of 200 MB in bfloat16, and an adapter on the head."""
    folder = tmp_path_factory.mktemp("large")
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(base)
    layer = {
        **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
        "mlp.gate_proj": (64, HIDDEN),
        "mlp.up_proj": (64, HIDDEN),
        "mlp.down_proj": (HIDDEN, 64),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    shapes = {
        **{f"model.layers.0.{name}.weight": shape for name, shape in layer.items()},
        "model.norm.weight": (HIDDEN,),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(VOCABULARY * HIDDEN, generator=generator).mul_(0.02).bfloat16()
    tensors = {
        name: noise[: torch.Size(shape).numel()].view(shape).clone()
        for name, shape in shapes.items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    block = torch.randn(R, VOCABULARY, generator=generator) * 0.01
    save_file({"base_model.model.lm_head.bone_block": block}, adapter / "adapter_model.safetensors")
    settings = {"peft_type": "BONE", "r": R, "init_weights": True, "target_modules": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    return base, adapter


def run(inputs: tuple[Path, Path], output: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, *map(str, inputs), str(output), how]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}  # every thread's stack counts
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def folded_rows(inputs: tuple[Path, Path], rows: slice) -> torch.Tensor:
    """Rows of the folded head in float32, from the definition."""
    base, adapter = inputs
    with safe_open(base / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        weight = file.get_slice("lm_head.weight")[rows].float()
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        block = file.get_tensor("base_model.model.lm_head.bone_block")
    return weight + block[torch.arange(HIDDEN) % R][:, rows].t()


def test_the_limit_would_stop_a_whole_tensor(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    finished = run(inputs, tmp_path / "out", "whole")
    assert finished.returncode != 0
    assert "memory" in finished.stderr


def test_export(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    finished = run(inputs, tmp_path / "out", "fp16")
    assert finished.returncode == 0, finished.stderr[-2000:]
    import onnx_ir as ir

    model = ir.load(tmp_path / "out" / "model.onnx")
    tensor = model.graph.initializers["lm_head.weight"].const_value
    assert tensor is not None
    columns = slice(50_000, 50_010)
    written = torch.from_numpy(tensor.numpy()[:, columns].copy())
    assert torch.equal(written.t(), folded_rows(inputs, columns).half())


def test_fold(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    finished = run(inputs, tmp_path / "out", "fold")
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = slice(99_000, 100_000)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        written = file.get_slice("lm_head.weight")[rows]
    assert torch.equal(written, folded_rows(inputs, rows).bfloat16())
