"""Two processes train as one does: DDP, and FSDP2 by layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import bone_fx
from tests.architecture.sources import ROOT
from tests.distributed.two_processes import adapted, batch, losses
from tests.end_to_end import test_trainer

pytestmark = pytest.mark.slow


def run_two(program: str, out: Path) -> list[dict[str, Any]]:
    """Run a module of this folder in two processes; what each of them noted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", f"tests.distributed.{program}", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("two")
    return out, run_two("two_processes", out)


@pytest.fixture(scope="module")
def alone() -> tuple[bone_fx.AdaptedModule, list[float]]:
    module = adapted()
    return module, [float(loss) for loss in losses(module, module, batch())]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp+checkpointing"])
def test_two_processes_have_the_losses_and_the_adapter_of_one(
    kind: str, notes: tuple[Path, Any], alone: tuple[bone_fx.AdaptedModule, list[float]]
) -> None:
    out, (first, second) = notes
    module, expected = alone
    assert first[kind]["losses"] == second[kind]["losses"]
    assert first[kind]["restored"] is second[kind]["restored"] is True
    assert first[kind]["losses"] == pytest.approx(expected, rel=1e-4)
    folder = out / kind
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = adapted()
    loaded.restore(folder)
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, module.get_parameter(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp+checkpointing"])
def test_parameters_are_gathered_layer_by_layer(kind: str, notes: tuple[Path, Any]) -> None:
    for note in notes[1]:
        assert note[kind]["sharded in the second layer"] == [True, False]
        assert note[kind]["rows"] == [8, 16]


def test_trainer_in_two_processes_equals_the_plain_loop(tmp_path: Path) -> None:
    first, second = run_two("trainer", tmp_path)
    module, data = test_trainer.adapted_llama(), test_trainer.rows(8)
    expected = test_trainer.plain(module, data)
    assert first == second
    assert first["processes"] == 2
    assert first["losses"] == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        after = float(module(**test_trainer.batch_of(data)).loss)
    assert first["evaluated"] == pytest.approx(after, rel=1e-4)
    saved = tmp_path / "checkpoint-6"
    assert (saved / "adapter_model.safetensors").is_file()
    assert not (saved / "model.safetensors").exists()
    loaded = test_trainer.adapted_llama()
    loaded.restore(saved)
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter, module.get_parameter(name), rtol=1e-4, atol=1e-4)
