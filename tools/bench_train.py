"""Training: time and memory of a step under bone_fx, PEFT, and no adapter at all.

SmolLM2-135M, every linear layer adapted, random tokens. The floor is the frozen model with
gradients flowing through every layer and an optimizer over as many numbers as a Bone adapter has.
Each run is a process of its own, and the contestants take turns. Peak memory is resident memory
above the loaded model, from the first step on; on a GPU that of tensors. LoRA has the rank that
makes its parameters as many as Bone's.

    python tools/bench_train.py
    python tools/bench_train.py --rounds 5 --json rows.jsonl --plot train.png
    python tools/bench_train.py --cases "PEFT bone" "bone_fx bone" --rounds 1 --steps 50 --rate 2e-4
    python tools/bench_train.py --in-turn --steps 20 --cases "PEFT bat" "bone_fx bat"
    python tools/bench_train.py --device cuda --dtype bfloat16 --batch 8 --length 1024
    python tools/bench_train.py --shape llama-1b --device cuda --dtype bfloat16 --length 1024
    python tools/bench_train.py --cases "PEFT bone, cuda graphs" "bone_fx bone, cuda graphs" ...

`--shape` takes random weights of a Llama's sizes in place of SmolLM2: nothing has to travel.
"Kernels" are those that a step starts (on a CPU, the operators that compute), "calls of Python"
the functions between them: what a small model on a GPU waits for.

With `--in-turn` the contestants train in one process, a step each in turn: a slow phase of the
machine meets all of them alike, ratios are those of neighbouring steps, and memory is not measured.

The loss difference is the largest of all steps, relative to max(1, PEFT's loss). What it can be at
best is said by PEFT against itself, with each number of the base's linear layers moved to one of
its neighbours in float32 ("one ulp"). "Of plain" is a variant against the same method without it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benching import interleave, ratios, report, smollm2, spread
from rich.console import Console

ROOT = Path(__file__).parents[1]
CASES = (
    "floor",
    "PEFT bone",
    "PEFT bat",
    "PEFT mini",
    "PEFT lora",
    "PEFT bone, one ulp",
    "PEFT bat, one ulp",
    "bone_fx bone",
    "bone_fx bat",
    "bone_fx mini",
    "bone_fx bone, checkpointing",
    "bone_fx bat, kept",
    "bone_fx bone, compiled",
    "bone_fx bat, compiled",
)
ON_CUDA = (
    "PEFT bone, compiled",
    "PEFT bone, cuda graphs",
    "PEFT bat, cuda graphs",
    "bone_fx bone, cuda graphs",
    "bone_fx bat, cuda graphs",
)
"""Cases by name only."""
DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = {
    "what": "what",
    "forward_s": "forward, s",
    "backward_s": "backward, s",
    "optimizer_s": "optimizer, s",
    "step_s": "step, s",
    "kernels": "kernels a step",
    "python_calls": "calls of Python",
    "of_floor": "of floor",
    "of_peft": "of PEFT's",
    "memory_gb": "above model, GB",
    "memory_of_peft": "of PEFT's",
    "of_plain": "step of plain",
    "memory_of_plain": "memory of plain",
    "loss_difference": "loss difference",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9, help="steps a run; the first two not timed")
    parser.add_argument(
        "--in-turn", action="store_true", help="one process, a step each in turn; no rounds"
    )
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("-r", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the base")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cases", nargs="+", choices=CASES + ON_CUDA, help="all but those of CUDA graphs"
    )
    parser.add_argument("--base", type=Path, help="a Hugging Face folder in place of SmolLM2")
    parser.add_argument("--shape", choices=("llama-1b", "llama-tiny"), help="random weights")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw time and memory into this PNG")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder to use")
    arguments = parser.parse_args()
    whole = arguments.dtype == "float32"
    cases = arguments.cases or [name for name in CASES if whole or "ulp" not in name]
    if not whole and any("ulp" in name for name in cases):
        parser.error(f"one ulp of float32 is none in {arguments.dtype}")
    if arguments.steps < 3:
        parser.error("--steps must be 3 or more: the first two are not timed")
    if arguments.plot and arguments.in_turn:
        parser.error("--plot shows memory, which --in-turn does not measure")
    if arguments.plot:
        _pyplot()
    if arguments.shape:
        base = Path(arguments.shape)
    else:
        base = arguments.base or smollm2(arguments.work / "smollm2")
    fixed = ("batch", "length", "r", "steps", "rate", "device", "dtype", "shape")
    shape = {name: getattr(arguments, name) for name in fixed}

    # torch.compile's own caches know an operator by its name, whatever it computes by now.
    caches = tempfile.TemporaryDirectory()
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches.name}

    def case(what: str, **which: Any) -> Any:
        settings = {**which, "base": str(base), "threads": arguments.threads, **shape}
        command = [sys.executable, str(ROOT / "tools" / "train_case.py"), json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit("\n".join([f"{what} failed:", *done.stderr.strip().splitlines()[-8:]]))
        return json.loads(done.stdout.strip().splitlines()[-1])

    def leg(name: str) -> Callable[[], dict[str, Any]]:
        return lambda: case(name, case=name)

    console = Console()
    if arguments.in_turn:
        console.print(f"{arguments.steps} steps of {len(cases)} cases in turn", style="dim")
        runs = case("the process", cases=cases)
    else:
        runs = interleave({name: leg(name) for name in cases}, arguments.rounds, console)
    rows = [_row(name, runs, shape) for name in runs]
    report(f"training of {base.name}", rows, COLUMNS, arguments.json)
    if arguments.plot:
        plot(rows, arguments.plot)


def _row(name: str, runs: dict[str, list[dict[str, Any]]], shape: dict[str, Any]) -> dict[str, Any]:
    own = runs[name]
    times = [run["step_s"] for run in own]
    row: dict[str, Any] = {"what": name, **shape}
    for part in ("forward_s", "backward_s", "optimizer_s", "step_s"):
        row[part] = spread([run[part] for run in own])
    row["parameters"] = own[0]["parameters"]
    row |= {name: own[0].get(name) for name in ("kernels", "python_calls")}
    row["accelerator"] = own[0]["accelerator"]
    row["memory_gb"] = _memory(own)
    if "floor" in runs:
        row["of_floor"] = ratios(times, [run["step_s"] for run in runs["floor"]])
    plain = name.partition(",")[0]
    if plain != name and plain in runs:
        row["of_plain"] = ratios(times, [run["step_s"] for run in runs[plain]])
        row["memory_of_plain"] = _of(_memory(own), _memory(runs[plain]))
    peft = "PEFT " + plain.removeprefix("bone_fx ").removeprefix("PEFT ")
    if name.startswith("bone_fx") and peft in runs:
        theirs = runs[peft]
        row["of_peft"] = ratios(times, [run["step_s"] for run in theirs])
        row["memory_of_peft"] = _of(_memory(own), _memory(theirs))
    if peft in runs and name != peft:
        row["loss_difference"] = max(
            abs(a - b) / max(1.0, abs(b))
            for a, b in zip(own[0]["losses"], runs[peft][0]["losses"], strict=True)
        )
    return row


def _memory(runs: list[dict[str, Any]]) -> float | None:
    """The least peak of some runs in GB, if they measured it."""
    peaks = [run["memory_gb"] for run in runs if "memory_gb" in run]
    return min(peaks, default=None)


def _of(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours is not None and theirs is not None else None


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw step time and memory, one bar a case."""
    figure, (left, right) = _pyplot().subplots(
        1, 2, sharey=True, figsize=(10, 1.2 + 0.32 * len(rows))
    )
    names = [row["what"] for row in rows]
    colors = ["tab:blue" if name.startswith("bone_fx") else "0.6" for name in names]
    times = [row["step_s"] for row in rows]
    around = [[t.median - t.low for t in times], [t.high - t.median for t in times]]
    left.barh(names, [t.median for t in times], xerr=around, color=colors)
    right.barh(names, [row["memory_gb"] for row in rows], color=colors)
    left.set(xlabel="step, s (median, smallest and largest)")
    right.set(xlabel="peak memory above the model, GB")
    left.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("agg")
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    return importlib.import_module("matplotlib.pyplot")


if __name__ == "__main__":
    main()
