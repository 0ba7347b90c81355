"""Inference: prefill and decode through onnxruntime-genai, of our graph and of the builder's.

Both hold the same merged weights of SmolLM2-135M (a Bone adapter on every linear layer folded in);
torch eager runs beside them in float32. In int4 ours is written in the builder's format (blocks of
32, symmetric, rounded to nearest), and once more by default, which is closer to the model and
larger. Every measurement is a process of its own: the second of
two generations is timed. Greedy tokens are compared.

    python tools/bench_infer.py
    python tools/bench_infer.py --dtype fp32 --prompt 128 --tokens 64 --rounds 7 --json rows.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benching import (
    AS_THE_BUILDER,
    adapted_and_merged,
    count_nodes,
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
    "runs": "runs",
    "dtype": "dtype",
    "prefill_ms": "prefill, ms",
    "decode_ms": "a token, ms",
    "prefill_speed": "prefill, of the builder's speed",
    "decode_speed": "decode, of the builder's speed",
    "nodes": "nodes",
    "tokens": "tokens",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=["fp32", "int4"], nargs="*", default=["fp32", "int4"])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--provider", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder to use")
    parser.add_argument("--leg", nargs=2, metavar=("genai|torch", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.leg:
        kind, folder = arguments.leg
        generate = {"genai": generate_with_genai, "torch": generate_with_torch}[kind]
        print(json.dumps(generate(folder, arguments.prompt, arguments.tokens)))
        return
    console = Console()
    base = smollm2(arguments.work / "smollm2")
    adapter, merged = adapted_and_merged(base, arguments.work)
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtype:
        rows += bench(dtype, base, adapter, merged, arguments, console)
    report(
        f"SmolLM2-135M, prompt of {arguments.prompt}, {arguments.tokens} tokens, "
        f"{arguments.provider} provider",
        rows,
        COLUMNS,
        arguments.json,
    )


def bench(
    dtype: str,
    base: Path,
    adapter: Path,
    merged: Path,
    arguments: argparse.Namespace,
    console: Console,
) -> list[dict[str, Any]]:
    """The rows of one dtype."""
    theirs = arguments.work / f"infer-builder-{dtype}"
    flags = {"bone_fx": AS_THE_BUILDER[dtype]}
    if dtype == "int4":
        flags["bone_fx default"] = []
    provider = arguments.provider
    folders: dict[str, Path] = {}
    for name, chosen in flags.items():
        console.print(f"export in {dtype}: {name}", style="dim")
        folders[name] = arguments.work / f"infer-{name.replace(' ', '-')}-{dtype}"
        export: list[str | Path] = [sys.executable, "-m", "bone_fx", base, "--adapter", adapter]
        export += ["-o", folders[name]]
        export += ["--overwrite", "--dtype", dtype, "--provider", provider, "--verify", "off", "-q"]
        measure([*export, *chosen])
    folders["genai builder"] = theirs
    builder: list[str | Path] = [
        sys.executable,
        "-m",
        "onnxruntime_genai.models.builder",
        "-i",
        merged,
        "-o",
        theirs,
    ]
    builder += ["-p", dtype, "-e", provider, "-c", arguments.work / "cache"]
    measure(builder)
    legs: dict[str, Callable[[], dict[str, Any]]] = {
        name: partial(_in_process, "genai", folder, arguments) for name, folder in folders.items()
    }
    if dtype == "fp32":
        legs["torch eager"] = partial(_in_process, "torch", merged, arguments)
    runs = interleave(legs, arguments.rounds, console)
    reference = runs["genai builder"]
    rows = []
    for name, measured in runs.items():
        folder = folders.get(name)
        same = all(m["sequence"] == r["sequence"] for m, r in zip(measured, reference, strict=True))
        row: dict[str, Any] = {
            "runs": name,
            "dtype": dtype,
            "tokens": "equal" if same else "differ",
        }
        for phase in ("prefill", "decode"):
            seconds = [m[phase] for m in measured]
            row[f"{phase}_ms"] = spread([1e3 * s for s in seconds])
            if name != "genai builder":
                row[f"{phase}_speed"] = ratios([r[phase] for r in reference], seconds)
        row["nodes"] = count_nodes(folder / "model.onnx") if folder else None
        rows.append(row)
    return rows


def _in_process(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = ["--prompt", str(arguments.prompt), "--tokens", str(arguments.tokens)]
    command = [sys.executable, __file__, "--leg", kind, str(folder), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip()[-800:])
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def generate_with_genai(folder: str, prompt: int, tokens: int) -> dict[str, Any]:
    """Seconds of the prefill and of a decoded token, and the sequence, in onnxruntime-genai."""
    import onnxruntime_genai as genai

    model = genai.Model(folder)
    result: dict[str, Any] = {}
    for _ in range(2):  # the first run warms up
        parameters = genai.GeneratorParams(model)
        length = prompt + tokens
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt_ids(prompt))
        prefill = time.perf_counter()
        steps = 0
        while not generator.is_done():
            generator.generate_next_token()
            steps += 1
        decode = (time.perf_counter() - prefill) / steps
        sequence = [int(token) for token in generator.get_sequence(0)]
        result = {"prefill": prefill - start, "decode": decode, "sequence": sequence}
    return result


def generate_with_torch(folder: str, prompt: int, tokens: int) -> dict[str, Any]:
    """The same in torch eager, float32, with a key/value cache."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    result: dict[str, Any] = {}
    for _ in range(2):
        sequence = prompt_ids(prompt)
        with torch.no_grad():
            start = time.perf_counter()
            output = model(torch.tensor([sequence]), use_cache=True)
            prefill = time.perf_counter()
            for _step in range(tokens):
                chosen = output.logits[:, -1].argmax(-1, keepdim=True)
                sequence.append(int(chosen))
                output = model(chosen, past_key_values=output.past_key_values, use_cache=True)
            decode = (time.perf_counter() - prefill) / tokens
        result = {"prefill": prefill - start, "decode": decode, "sequence": sequence}
    return result


def prompt_ids(length: int) -> list[int]:
    """Token ids that differ from each other, without special ones."""
    return [1000 + (7 * i) % 4001 for i in range(length)]


if __name__ == "__main__":
    main()
