"""A small fixed sample of the campaigns in tools/: kills at random moments, damaged inputs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("kills", ["--kills", "1", "--seed", "3", "--real", "0"]),
        ("fuzz", ["--count", "4", "--seed", "1", "--real", "0"]),
    ],
)
def test_a_sample(program: str, arguments: list[str]) -> None:
    command = [sys.executable, f"tools/{program}.py", *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ", 0 wrong" in done.stdout
