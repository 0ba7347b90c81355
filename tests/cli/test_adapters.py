"""Adapters as a person names them: folders, names, hub ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bone_fx
from bone_fx.cli.adapters import named_adapters
from bone_fx.errors import AdapterError, UsageError
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.hub import REPOSITORY, cached, commit_of, local_hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    tiny_base(folder / "base")
    tiny_adapter(folder / "run1" / "checkpoint-500")
    tiny_adapter(folder / "run2" / "checkpoint-500", std=0.1)
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an adapter in two revisions, and no network."""
    runs = {"main": folder / "run1" / "checkpoint-500", "v2": folder / "run2" / "checkpoint-500"}
    cached(tmp_path / "hub", "owner/adapter", runs)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def folded(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_two_folders_of_one_name(folder: Path, tmp_path: Path) -> None:
    given = [folder / f"run{n}" / "checkpoint-500" for n in (1, 2)]
    named: dict[str, list[object]] = {
        "unnamed": ["--adapter", given[0], "--adapter", given[1]],
        "named": ["--adapter", f"style={given[0]}", "--adapter", f"facts={given[1]}"],
        "one of them": ["--adapter", given[0], "--adapter", f"facts={given[1]}"],
    }
    names = {}
    for name, arguments in named.items():
        done = run("fold", folder / "base", *arguments, "-o", tmp_path / name, "-q", "--json")
        assert done.returncode == 0, done.stderr
        names[name] = [adapter["name"] for adapter in json.loads(done.stdout)["adapters"]]
    assert names == {
        "unnamed": ["run1/checkpoint-500", "run2/checkpoint-500"],
        "named": ["style", "facts"],
        "one of them": ["checkpoint-500", "facts"],
    }
    assert folded(tmp_path / "unnamed") == folded(tmp_path / "named")
    by_name = {"a": given[0], "b": given[1]}
    result = bone_fx.fold_checkpoint(folder / "base", adapters=by_name, output=tmp_path / "python")
    assert [adapter["name"] for adapter in result.manifest["adapters"]] == ["a", "b"]
    assert folded(tmp_path / "python") == folded(tmp_path / "named")


def test_what_is_a_name_and_what_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1e-3").mkdir()
    assert named_adapters(["lr=1e-3"]) == ["lr=1e-3"]
    assert named_adapters(["./lr=2e-3/last"]) == ["./lr=2e-3/last"]
    assert named_adapters(["lr=2e-3"]) == {"lr": "2e-3"}
    assert named_adapters(["a=owner/one@v2", "owner/two@v1"]) == {
        "a": "owner/one@v2",
        "two": "owner/two@v1",
    }
    with pytest.raises(UsageError, match="two adapters are called b"):
        named_adapters(["b=x", "y/b"])
    with pytest.raises(UsageError, match="given twice"):
        bone_fx.fold_checkpoint("base", adapters={"a": "x", "b": "x"}, output="out")


def test_an_adapter_by_its_hub_id(folder: Path, hub: Path) -> None:
    outs = {"run1": "owner/adapter", "run2": "owner/adapter@v2"}
    for name, hub_id in outs.items():
        done = run("fold", folder / "base", "--adapter", hub_id, "-o", hub / name, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["adapters"][0]["folder"] == "owner/adapter"
        local = folder / name / "checkpoint-500"
        bone_fx.fold_checkpoint(folder / "base", adapters=[local], output=hub / f"{name} local")
        assert folded(hub / name) == folded(hub / f"{name} local")
    both = run("inspect", "owner/adapter@v2", "--json")
    assert json.loads(both.stdout)["adapter"] == "owner/adapter@v2"
    snapshot = hub / "hub" / "models--owner--adapter" / "snapshots" / commit_of("main")
    done = run("fold", folder / "base", "--adapter", "owner/adapter", "-o", snapshot, "--overwrite")
    assert done.returncode == 2
    assert "overlaps the input" in done.stderr


def test_an_adapter_that_the_hub_does_not_have(folder: Path, hub: Path) -> None:
    for hub_id in ("owner/other", "owner/adapter@v3"):
        with pytest.raises(AdapterError, match="could not be fetched"):
            bone_fx.fold_checkpoint(folder / "base", adapters=[hub_id], output=hub / "out")


def test_an_adapter_is_fetched_from_the_hub(folder: Path, tmp_path: Path) -> None:
    adapter = folder / "run1" / "checkpoint-500"
    (adapter / "optimizer.pt").write_bytes(b"not wanted")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with local_hub(adapter) as served:
        environment |= {
            "HF_ENDPOINT": served.address,
            "HF_HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "bone_fx", "inspect", REPOSITORY, "--json"]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
    (adapter / "optimizer.pt").unlink()
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["blocks"]) == 6
    assert not [path for path in served.asked if "optimizer" in path]
