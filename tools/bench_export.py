"""Export: wall time, peak memory, bytes and nodes of bone_fx and of the exporters beside it.

SmolLM2-135M with a Bone adapter on every linear layer. bone_fx folds the adapter while it exports;
the others, which know no Bone, are given the merged model. "bone_fx, LoRA" takes the same adapter
converted to LoRA, on the same layers. Each run is a process of its own, from start to exit, without
verification.

    python tools/bench_export.py                   # against onnxruntime-genai's builder
    python tools/bench_export.py --transformers    # and transformers' exporter, once (minutes)
    python tools/bench_export.py --dtype fp16 --rounds 5 --json rows.jsonl
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benching import (
    Measured,
    adapted_and_merged,
    count_nodes,
    folder_bytes,
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
    "exporter": "exporter",
    "dtype": "dtype",
    "wall_s": "wall, s",
    "of_builder": "of the builder's",
    "of_bone": "of Bone's",
    "peak_gb": "peak, GB",
    "file_gb": "files, GB",
    "nodes": "nodes",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["fp32", "fp16"], nargs="*", default=["fp32", "fp16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--transformers", action="store_true", help="also transformers' exporter")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder to use")
    parser.add_argument("--transformers-leg", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.transformers_leg:
        export_with_transformers(*arguments.transformers_leg)
        return
    console = Console()
    base = smollm2(arguments.work / "smollm2")
    adapter, merged = adapted_and_merged(base, arguments.work)
    adapters = {"bone_fx": adapter, "bone_fx, LoRA": as_lora(adapter, base)}
    rows = []
    for dtype in arguments.dtype:
        rows += bench(dtype, base, adapters, merged, arguments.work, arguments.rounds, console)
    if arguments.transformers:
        out = arguments.work / "export-transformers"
        run = measure([sys.executable, __file__, "--transformers-leg", merged, out])
        rows.append(_row("transformers", "fp32", [run], out))
    report("export of SmolLM2-135M with a Bone adapter", rows, COLUMNS, arguments.json)


def as_lora(adapter: Path, base: Path) -> Path:
    """The adapter as a LoRA of the same layers and rank."""
    import bone_fx

    lora = adapter.with_name(f"{adapter.name}-lora")
    return bone_fx.convert_adapter(
        adapter, to="lora", base=base, output=lora, overwrite=True
    ).output


def bench(
    dtype: str,
    base: Path,
    adapters: Mapping[str, Path],
    merged: Path,
    work: Path,
    rounds: int,
    console: Console,
) -> list[dict[str, Any]]:
    """The rows of one dtype."""
    outs = {name: work / f"export-{n}-{dtype}" for n, name in enumerate(adapters)}
    theirs = work / f"export-builder-{dtype}"
    provider = {"fp32": "cpu", "fp16": "cuda"}[dtype]
    options = ["--dtype", dtype, "--provider", provider, "--verify", "off", "-q"]
    commands: dict[str, list[str | Path]] = {
        name: [sys.executable, "-m", "bone_fx", base, "--adapter", adapter, "-o", outs[name]]
        for name, adapter in adapters.items()
    }
    builder: list[str | Path] = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        merged,
    ]
    builder += ["-o", theirs, "-p", dtype, "-e", provider, "-c", work / "cache"]

    def leg(out: Path, arguments: list[str | Path]) -> Callable[[], Measured]:
        def run() -> Measured:
            shutil.rmtree(out, ignore_errors=True)
            return measure(arguments)

        return run

    legs = {name: leg(outs[name], [*commands[name], *options]) for name in adapters}
    runs = interleave({**legs, "builder": leg(theirs, builder)}, rounds, console)
    bone = next(iter(adapters))
    return [
        *(_row(n, dtype, runs[n], out, runs["builder"], runs[bone]) for n, out in outs.items()),
        _row("genai builder", dtype, runs["builder"], theirs),
    ]


def _row(
    exporter: str,
    dtype: str,
    runs: list[Measured],
    out: Path,
    builder: list[Measured] | None = None,
    bone: list[Measured] | None = None,
) -> dict[str, Any]:
    walls = [run.wall for run in runs]
    return {
        "exporter": exporter,
        "dtype": dtype,
        "wall_s": spread(walls),
        "of_builder": ratios(walls, [run.wall for run in builder]) if builder else None,
        "of_bone": ratios(walls, [run.wall for run in bone]) if bone else None,
        "peak_gb": max(run.peak for run in runs) / 1e9,
        "file_gb": folder_bytes(out) / 1e9,
        "nodes": " + ".join(str(count_nodes(path)) for path in sorted(out.glob("*.onnx"))),
    }


def export_with_transformers(folder: Path, out: Path) -> None:
    """Export as transformers does it for generation: one graph for the prompt, one for decoding."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0  # a mask of ones would be left out of the graph
    inputs: Any = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": mask}
    exporter: Any = OnnxExporter()  # type: ignore[no-untyped-call]  # it has no types
    exported = exporter.export_for_generation(
        model, inputs, OnnxConfig(dynamic=True), multi_token_decode=True
    )
    exported.save_pretrained(out)


if __name__ == "__main__":
    main()
