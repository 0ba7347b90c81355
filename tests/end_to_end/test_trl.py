"""TRL's trainers train an adapted module as it is, with PEFT's losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "trl_trainers.py"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with TRL beside what is installed here."""
    folder = tmp_path_factory.mktemp("trl")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    place = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    here = f"{sysconfig.get_path('purelib')}\n{ROOT}\n"
    (place / "site-packages" / "here.pth").write_text(here)
    interpreter = folder / "bin" / "python"
    pins = ["trl==1.16.0", "-c", ROOT / "tools" / "constraints.txt"]
    subprocess.run([interpreter, "-m", "pip", "install", "-q", *pins], check=True)
    return interpreter


@pytest.mark.parametrize("kind", ["sft", "packed", "dpo", "reward"])
def test_losses_are_pefts(kind: str, python: Path, tmp_path: Path) -> None:
    results: dict[str, Any] = {}
    for library in ("peft", "bone_fx"):
        done = subprocess.run(
            [python, SCRIPT, kind, library, tmp_path / library],
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        results[library] = json.loads(done.stdout.strip().splitlines()[-1])
    theirs, ours = results["peft"], results["bone_fx"]
    assert len(ours["losses"]) == 10
    for one, other in zip(ours["losses"], theirs["losses"], strict=True):
        assert abs(one - other) <= 1e-4 * max(1.0, other)
    assert ours["files"] == theirs["files"]
    assert ours["loads"] == theirs["loads"] == 0
