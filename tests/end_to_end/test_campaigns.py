"""A small fixed sample of the campaigns in tools/: kills at random moments, damaged inputs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.architecture.sources import ROOT

# In one process: it forks the runs, so that its imports are done once.
BOTH = """
import fuzz, kills
assert fuzz.main(["--count", "4", "--seed", "1", "--real", "0"]) == 0
assert kills.main(["--kills", "1", "--seed", "3", "--real", "0"]) == 0
"""


@pytest.mark.slow
def test_a_sample() -> None:
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tools")))
    done = subprocess.run(
        [sys.executable, "-c", BOTH],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 inputs" in done.stdout
    assert "1 kills" in done.stdout
    assert done.stdout.count(", 0 wrong") == 2
