"""Fold of a checkpoint: wall time and peak memory of `bone-export fold`, PEFT's merge and `cp`.

SmolLM2-135M with a Bone block on every linear layer. PEFT 0.18 loads the model, merges and
saves it; `bone-export fold` also reads every folded weight back. Each run is a process of its own.

    python tools/bench_fold.py
    python tools/bench_fold.py --rounds 5 --json rows.jsonl
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benching import (
    Measured,
    adapted_and_merged,
    interleave,
    measure,
    ratios,
    report,
    smollm2,
    spread,
)
from rich.console import Console

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "what": "what",
    "wall_s": "wall, s",
    "of_cp": "of cp + sync",
    "of_peft": "of PEFT's",
    "peak_gb": "peak, GB",
}
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder to use")
    arguments = parser.parse_args()
    work = arguments.work
    base = smollm2(work / "smollm2")
    adapter, _ = adapted_and_merged(base, work)
    out = work / "folded"

    def leg(command: list[str | Path]) -> Callable[[], Measured]:
        def run() -> Measured:
            shutil.rmtree(out, ignore_errors=True)
            return measure(command)

        return run

    fold: list[str | Path] = [sys.executable, "-m", "bone_fx", "fold", base, "--adapter", adapter]
    legs = {
        "bone-export fold": leg([*fold, "-o", out, "-q"]),
        "PEFT": leg([sys.executable, "-c", PEFT, base, adapter, out]),
        "cp + sync": leg(["sh", "-c", f"cp -r '{base}' '{out}' && sync"]),
    }
    runs = interleave(legs, arguments.rounds, Console())
    walls = {name: [run.wall for run in found] for name, found in runs.items()}
    rows = [
        {
            "what": name,
            "wall_s": spread(walls[name]),
            "of_cp": ratios(walls[name], walls["cp + sync"]),
            "of_peft": ratios(walls[name], walls["PEFT"]),
            "peak_gb": max(run.peak for run in found) / 1e9,
        }
        for name, found in runs.items()
    ]
    report("fold of SmolLM2-135M", rows, COLUMNS, arguments.json)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
