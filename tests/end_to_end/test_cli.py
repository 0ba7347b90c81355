"""`bone-export` as a person meets it: bad inputs beyond the public list, interruption, help and
JSON."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.tiers import slow

COMMAND = [sys.executable, "-m", "bone_fx"]
STAGES = [
    "read the inputs",  # and nothing is on disk
    "write the model",
    "verify (full",
]
# `bone-export`, which waits in a stage for the signal: a tiny model is done before a busy machine
# comes to send one. A suite that was started in the background has SIGINT ignored.
WAITING = """
import signal, sys, time
from bone_fx.cli import program
from bone_fx.progress import Lines

def begin(self, name, shown=Lines.stage, stage=sys.argv.pop(1)):
    shown(self, name)
    if name.startswith(stage):
        time.sleep(600)

signal.signal(signal.SIGINT, signal.default_int_handler)
Lines.stage = begin
program()
"""


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )


def tree(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "report.html"
    }


def refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    text = result.stdout + result.stderr
    assert result.returncode == code, text
    assert "Traceback" not in text
    for word in words:
        assert word in text


@pytest.fixture
def work(tmp_path: Path) -> Path:
    tiny_base(tmp_path / "base")
    tiny_adapter(tmp_path / "adapter")
    return tmp_path


# Nodes are named after what was traced before them: with the cache as the process has it.
@torch._dynamo.config.patch(fake_tensor_cache_enabled=True)
def test_json_is_one_object_and_twice_the_same_bytes(work: Path) -> None:
    folders = []
    for name, start in (("one", run), ("two", process)):
        result = start(work / "base", "--adapter", work / "adapter", "-o", work / name, "--json")
        assert result.returncode == 0, result.stderr
        content = json.loads(result.stdout)
        assert content["verified"] is True
        assert content["operators"]["com.microsoft::GroupQueryAttention"] == 2
        assert len(content["adapters"][0]["sites"]) == 6
        folders.append(tree(work / name))
    assert folders[0] == folders[1]
    assert set(folders[0]) >= {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "bone_export.json",
    }


@pytest.mark.slow
def test_fold_in_a_process_of_its_own(work: Path) -> None:
    out = work / "out"
    done = process("fold", work / "base", "--adapter", work / "adapter", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kind"] == "checkpoint"
    assert (out / "model.safetensors").exists()


def test_adapter_for_another_width(work: Path) -> None:
    tiny_adapter(work / "wide", width=64)
    before = tree(work)
    refused(
        run(work / "base", "--adapter", work / "wide", "-o", work / "out"),
        3,
        "q_proj",
        "[16, 48]",
        "[16, 64]",
    )
    assert tree(work) == before


def test_unknown_dtype(work: Path) -> None:
    refused(run(work / "base", "-o", work / "out", "--dtype", "fp8"), 2, "fp8", "fp16")
    assert not (work / "out").exists()


def test_base_without_weights(work: Path) -> None:
    (work / "base" / "model.safetensors").unlink()
    refused(run(work / "base", "-o", work / "out"), 3, "base", "safetensors")
    assert not (work / "out").exists()


def test_base_that_lacks_a_tensor(work: Path) -> None:
    from safetensors.torch import save_file

    weights = load_file(work / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, work / "base" / "model.safetensors", {"format": "pt"})
    refused(run(work / "base", "-o", work / "out"), 3, "model.layers.1.mlp.up_proj.weight")


@pytest.mark.skipif(
    not Path("/proc/self/mounts").exists(), reason="needs a file system that nobody can write to"
)
def test_output_that_cannot_be_written(work: Path) -> None:
    before = tree(work)
    refused(
        run(work / "base", "-o", "/proc/nowhere/out"), 5, "/proc/nowhere/out", "cannot be written"
    )
    assert tree(work) == before


def test_errors_as_json(work: Path) -> None:
    result = run(work / "base", "--adapter", work / "nowhere", "-o", work / "out", "--json")
    content = json.loads(result.stdout)
    assert content["exit_code"] == result.returncode == 3
    assert "nowhere" in content["message"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the provider is here")
def test_json_is_all_that_stdout_has_where_a_provider_is_missing(work: Path) -> None:
    result = process(work / "base", "-o", work / "out", "--provider", "cuda", "--json")
    assert json.loads(result.stdout)["exit_code"] == result.returncode == 7


def test_overwrite_keeps_the_earlier_output_until_the_new_one_is_good(work: Path) -> None:
    out = work / "out"
    assert run(work / "base", "-o", out, "-q").returncode == 0
    before = tree(out)
    refused(run(work / "base", "-o", out), 2, "--overwrite")
    tiny_adapter(work / "wide", width=64)
    refused(run(work / "base", "--adapter", work / "wide", "-o", out, "--overwrite"), 3)
    assert tree(out) == before
    assert (
        run(work / "base", "--adapter", work / "adapter", "-o", out, "--overwrite").returncode == 0
    )
    assert tree(out) != before


@pytest.mark.parametrize(
    "stage",
    ["write the model", *slow(*(s for s in STAGES if s != "write the model"))],
)
def test_interrupted_in_a_stage(stage: str, work: Path) -> None:
    before = tree(work)
    names = {path.name for path in work.iterdir()}
    command = [sys.executable, "-c", WAITING, stage, str(work / "base")]
    process = subprocess.Popen(
        [*command, "--adapter", str(work / "adapter"), "-o", str(work / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    seen = ""
    while stage not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, seen + rest
    assert "Traceback" not in seen + rest
    assert "interrupted" in rest
    assert tree(work) == before
    assert {path.name for path in work.iterdir()} == names


def test_inputs_and_foreign_folders_are_never_overwritten(work: Path) -> None:
    (work / "notes").mkdir()
    (work / "notes" / "mine.txt").write_text("keep me")
    before = tree(work)
    arguments = ["--adapter", work / "adapter", "--overwrite"]
    for target in ("base", "adapter", ".", "base/out"):
        refused(run(work / "base", *arguments, "-o", work / target), 2, "overlaps the input")
    refused(run(work / "base", *arguments, "-o", work / "notes"), 2, "no earlier export")
    assert tree(work) == before
