"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
