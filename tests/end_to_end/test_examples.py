"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.tiny import tiny_base

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_own_graph(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "own_graph.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "adapted_linear" in done.stdout
    losses = [
        float(line.rpartition(" ")[2])
        for line in done.stdout.splitlines()
        if line.startswith("step")
    ]
    assert losses[-1] < 0.2 * losses[0]
    assert "verified=True" in done.stdout
    assert (tmp_path / "out" / "model.onnx").exists()


def _run(*arguments: str | Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _losses(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"(?:loss |'loss': ')([\d.]+)", text)]


def test_smollm2_in_a_plain_loop(smollm2: Path, tmp_path: Path) -> None:
    losses = _losses(_run(EXAMPLES / "smollm2_loop.py", smollm2, tmp_path / "out", "4"))
    assert losses[-1] < 0.9 * losses[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_smollm2_with_trainer(smollm2: Path, tmp_path: Path) -> None:
    _run(EXAMPLES / "smollm2_trainer.py", smollm2, tmp_path, "2")
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert (folder / "adapter_model.safetensors").exists()
        assert not (folder / "model.safetensors").exists()


def test_minilm_tells_sentences_apart(minilm: Path, tmp_path: Path) -> None:
    text = _run(EXAMPLES / "minilm_sentences.py", minilm, tmp_path, "1")
    assert float(re.findall(r"accuracy ([\d.]+)", text)[0]) > 0.8
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_vit_reads_digits(tmp_path: Path) -> None:
    text = _run(EXAMPLES / "vit_digits.py", tmp_path)
    assert float(re.findall(r"accuracy ([\d.]+)", text)[0]) > 0.95


def test_fsdp2_in_two_processes(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    losses = _losses(_run(*torchrun, EXAMPLES / "fsdp2.py", base, tmp_path / "out"))
    assert losses[-1] < losses[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
