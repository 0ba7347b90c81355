"""README and guides, followed from top to bottom in an empty folder, offline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.blocks import ROOT, SEQUENCES, blocks
from tests.deploy.test_companions import PLAIN, tokenizer
from tests.end_to_end.tiny import tiny_base
from tools.hub_cache import MINILM, SMOLLM2, lay_out

pytestmark = pytest.mark.slow

SAVE = "plt.savefig(f'{plt.gcf().number}.png')"
"""What stands for a window that shows a figure."""


@pytest.fixture
def hub(tmp_path: Path, minilm: Path) -> Path:
    """A home of the hub in which a tiny Llama has the name of SmolLM2."""
    tiny_base(tmp_path / "base", eos_token_id=2)
    tokenizer(tmp_path / "base", template=PLAIN)
    lay_out(tmp_path / "home" / "hub", SMOLLM2, tmp_path / "base")
    lay_out(tmp_path / "home" / "hub", MINILM, minilm)
    return tmp_path / "home"


def run(code: str, language: str, folder: Path, hub: Path) -> str:
    """Run a piece of code in a folder, with a hub's home; what it prints."""
    commands = {"python": [sys.executable, "-c"], "bash": ["bash", "-euo", "pipefail", "-c"]}
    environment = {
        **os.environ,
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]),
    }
    done = subprocess.run(
        [*commands[language], code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("documents", SEQUENCES, ids=lambda each: Path(each[0]).stem)
def test_what_a_document_says_works(documents: tuple[str, ...], hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    folder.mkdir()
    runnable = [
        block
        for document in documents
        for block in blocks(ROOT / document)
        if block.language in ("python", "bash") and not block.is_fragment
    ]
    assert {block.document for block in runnable} == set(documents)
    for block in runnable:
        run(block.code, block.language, folder, hub)


def test_the_notebook_runs_from_top_to_bottom(hub: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    content = json.loads((ROOT / "examples" / "training_curves.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in content["cells"])
    folder = tmp_path / "user"
    folder.mkdir()
    code = "\n\n".join(cells).replace("plt.show()", SAVE)
    printed = run(code, "python", folder, hub)
    losses = re.findall(r"loss ([\d.]+) to ([\d.]+), 4 layers", printed)
    assert len(losses) == 3
    assert all(float(last) < float(first) for first, last in losses)
    assert len(list(folder.glob("*.png"))) == 2
