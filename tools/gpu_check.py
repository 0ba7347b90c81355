"""Export folders on a GPU: where nodes run, what they give, how fast, with CUDA graphs and without.

    python tools/gpu_check.py OUT [OUT ...]                     # on CUDA
    python tools/gpu_check.py OUT --against BUILDERS            # with the builder's folder in turn
    python tools/gpu_check.py OUT --random --prompts 128,4096   # only the graphs had to travel
    python tools/gpu_check.py OUT --provider cpu                # the same where there is no GPU

A folder of variants has rows for each of its graphs. Needs onnxruntime, onnx and numpy alone.
Decoders run as onnxruntime-genai runs them: inputs and outputs bound on the device, one buffer for
past and present, greedily, without an end. Each graph and setting gives one JSON line and a row of
the table. Settings are the session entries of the folder's own genai_config.json without a CUDA
graph, the same with a mask as wide as the cache and a CUDA graph, and the other choice for products
of 4 and 8 bits (fpA_intB) where there are any.

Exits with 1 if a folder does not run, gives something that is not finite or not what the CPU
provider gives, if nodes do not run where its bone_export.json says, or a graph is not captured
though it says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from gpu_decoder import CUDA, Decoder, device_memory, fill_at_random, models_of

TOLERANCE = {"tensor(float)": 1e-4, "tensor(float16)": 2e-2, "tensor(bfloat16)": 0.1}
"""Of the largest logit, by their dtype: what CUDA's other order of sums may cost."""
INT8_CACHE = 0.2
"""The same with a cache in int8: CUDA reads a prompt's keys before they are rounded. One in fp8 has
no CPU kernel to compare with."""
INT8_ACTIVATIONS = 0.1
"""The same where the CPU's product rounds its activations to 8 bits and CUDA's does not."""
PARITY_BYTES = 4 << 30
"""Larger folders are not run on the CPU too."""
FPA = "ep.cuda.fpa_intb_gemm"
COLUMNS = ("folder", "setting", "placement", "attention", "parity", "tokens_equal", "memory_gb")


def settings_of(model: Path, provider: str) -> dict[str, dict[str, Any]]:
    """Name of a setting -> `graph` and session `entries`, for one graph."""
    written = _json(model.with_name("genai_config.json")).get("model", {})
    options = written.get("decoder", {}).get("session_options", {})
    entries = {k: v for k, v in options.items() if "." in k and isinstance(v, str)}
    settings = {"as written": {"graph": False, "entries": entries}}
    if captured(model):
        name = "CUDA graph" if provider == "cuda" else "static mask"
        settings[name] = {"graph": True, "entries": entries}
    nodes = onnx.load(model, load_external_data=False).graph.node
    if any(node.op_type == "MatMulNBits" for node in nodes):
        flipped = "0" if entries.get(FPA) == "1" else "1"
        name = "without fpA_intB" if flipped == "0" else "with fpA_intB"
        changed = {**entries, FPA: flipped}
        settings[name] = {"graph": settings.keys() > {"as written"}, "entries": changed}
    return settings


def captured(model: Path) -> bool:
    """Whether a folder says that a graph can be captured; one of others, if its cache stands."""
    placement = placement_of(model)
    if placement:
        return bool(placement["cuda_graph"] == "yes")
    search = _json(model.with_name("genai_config.json")).get("search", {})
    return bool(search.get("past_present_share_buffer"))


def placement_of(model: Path) -> dict[str, Any] | None:
    """What the manifest beside a graph says of its placement."""
    manifest = _json(model.with_name("bone_export.json"))
    said = manifest.get("variants", {}).get(model.stem, manifest)
    found: dict[str, Any] | None = said.get("placement")
    return found


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def placed(decoder: Decoder, model: Path) -> str:
    """Where the session's nodes are, against what the manifest says of them."""
    actual: Counter[str] = Counter()
    for part in decoder.session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            actual[f"{part.ep_name.removesuffix('ExecutionProvider')}:{node.op_type}"] += 1
    on_cpu = {name[4:]: n for name, n in actual.items() if name.startswith("CPU:")}
    placement = placement_of(model)
    if not placement:
        return f"{sum(on_cpu.values())} on the CPU"
    said = Counter(name.rpartition("::")[2] for name in placement["on_cpu"].values())
    more = {name: n for name, n in on_cpu.items() if n > said[name]}
    return f"{sum(on_cpu.values())} on the CPU" if not more else f"not as written: {more}"


@contextmanager
def attention_kernels() -> Iterator[list[str]]:
    """Gathers which attention kernels run meanwhile, as ONNX Runtime prints them."""
    found: list[str] = []
    os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"] = "1"
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield found
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            del os.environ["ORT_ENABLE_ATTENTION_KERNEL_DEBUG_INFO"]
            file.seek(0)
            text = file.read().decode(errors="replace")
            found += sorted({w[10:] for w in text.split() if w.startswith("SdpaKernel=")})


def prompt_of(tokens: int, batch: int, vocabulary: int) -> np.ndarray:
    """Token ids `[B, S]`."""
    ids = 3 + np.arange(batch * tokens).reshape(batch, -1) * 7 % (vocabulary - 3)
    return ids.astype(np.int64)


def greedy(decoder: Decoder, ids: np.ndarray, tokens: int) -> tuple[list[np.ndarray], list[float]]:
    """Last logits of each step, and the seconds of each; the first is the prefill."""
    decoder.begin(ids.shape[0], ids.shape[1] + tokens)
    logits, seconds = [], []
    for _ in range(tokens):
        start = time.perf_counter()
        last = decoder.step(ids)
        seconds.append(time.perf_counter() - start)
        logits.append(last)
        ids = last.argmax(-1)[:, None].astype(np.int64)
    return logits, seconds


def checked(model: Path, name: str, setting: dict[str, Any], chosen: Any) -> dict[str, Any]:
    """Everything but speed, for one graph and setting; what fails is said in the row."""
    folder, variant = model.parent.name, model.name != "model.onnx"
    row: dict[str, Any] = {"folder": f"{folder}/{model.stem}" if variant else folder}
    row |= {"setting": name, "wrong": []}
    try:
        _check(row, model, setting, chosen)
    except Exception as error:  # noqa: BLE001 - of ONNX Runtime; the other folders still run
        lines = str(error).splitlines() or [type(error).__name__]
        row["wrong"].append(lines[0][:300])
    return row


def _check(row: dict[str, Any], model: Path, setting: dict[str, Any], chosen: Any) -> None:
    provider, before = chosen.provider, device_memory(chosen.provider)
    start = time.perf_counter()
    with attention_kernels() as kernels:
        decoder = Decoder(model, provider, setting["graph"], setting["entries"])
        row["load_s"] = round(time.perf_counter() - start, 2)
        row["placement"] = placed(decoder, model) if provider == "cuda" else "all on the CPU"
        ids = prompt_of(min(64, chosen.prompts[0]), chosen.batch, decoder.vocabulary)
        found, _ = greedy(decoder, ids, chosen.check)
    row["attention"] = ", ".join(kernels) or "-"
    row["memory_gb"] = round(max(0, device_memory(provider) - before) / 1e9, 3)
    if not all(np.isfinite(each).all() for each in found):
        row["wrong"].append("logits that are not finite")
    if row["placement"].startswith("not"):
        row["wrong"].append(row["placement"])
    if not decoder.runs_on_cpu or decoder.bytes > PARITY_BYTES:
        return
    expected, _ = greedy(Decoder(model, "cpu", graph=False, entries={}), ids, chosen.check)
    far, tokens = 0.0, []
    for ours, theirs in zip(found, expected, strict=True):
        tokens.append(bool((ours.argmax(-1) == theirs.argmax(-1)).all()))
        far = max(far, float(np.abs(ours - theirs).max() / max(1e-6, np.abs(theirs).max())))
        if not tokens[-1]:
            break  # from here on the texts are others
    row["parity"], row["tokens_equal"] = float(f"{far:.3g}"), f"{sum(tokens)}/{len(found)}"
    limit = INT8_ACTIVATIONS if decoder.rounds_activations else TOLERANCE[decoder.dtype]
    if decoder.rounds_cache and provider == "cuda":
        limit = max(limit, INT8_CACHE)
    if far > limit:
        row["wrong"].append(f"logits differ from the CPU's by {far:.3g}, more than {limit}")


def race(
    models: list[Path], setting: dict[str, Any], chosen: Any, rows: dict[Path, dict[str, Any]]
) -> None:
    """Seconds of prefill and decode of graphs in turn, added to their rows."""
    graph, entries = setting["graph"], setting["entries"]
    decoders = {model: Decoder(model, chosen.provider, graph, entries) for model in models}
    for prompt in chosen.prompts:
        times: dict[Path, tuple[list[float], list[float]]] = {m: ([], []) for m in models}
        for turn in range(chosen.repeats + 1):
            for model in models if turn % 2 else models[::-1]:
                decoder = decoders[model]
                ids = prompt_of(prompt, chosen.batch, decoder.vocabulary)
                _, seconds = greedy(decoder, ids, chosen.tokens)
                if turn:  # the first warms up
                    times[model][0].append(seconds[0])
                    times[model][1].append(statistics.median(seconds[1:]))
        first = models[0]
        for model in models:
            for what, place in (("prefill", 0), ("decode", 1)):
                values = times[model][place]
                rows[model][f"{what}_{prompt}_ms"] = round(1e3 * statistics.median(values), 3)
                if model != first:
                    shares = [a / b for a, b in zip(times[first][place], values, strict=True)]
                    low, middle, high = min(shares), statistics.median(shares), max(shares)
                    rows[model][f"{what}_{prompt}_of_first"] = (
                        f"{middle:.3f} ({low:.3f} to {high:.3f})"
                    )


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    more = [key for row in rows for key in row if key.startswith(("prefill", "decode"))]
    names = [*COLUMNS, *dict.fromkeys(more), "wrong"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [row.get(name, "") for name in names[:-1]] + ["; ".join(row["wrong"])]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Check the folders; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--against", type=Path, help="a folder to compare the first with, in turn")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--random", action="store_true", help="write random weights first")
    parser.add_argument("--prompts", default="128,1024,4096", help="lengths, with commas")
    parser.add_argument("--tokens", type=int, default=64, help="to generate after each prompt")
    parser.add_argument("--check", type=int, default=16, help="tokens of the comparison")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--no-speed", action="store_true", help="compare and place only")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    chosen = parser.parse_args(arguments)
    chosen.prompts = [int(each) for each in chosen.prompts.split(",")]
    if chosen.provider == "cuda":
        CUDA.require()
    rows: list[dict[str, Any]] = []
    others = models_of(chosen.against) if chosen.against else []
    if chosen.random:
        for each in (*chosen.folders, *([chosen.against] if chosen.against else [])):
            fill_at_random(each)
    for model in (model for folder in chosen.folders for model in models_of(folder)):
        same = [other for other in others if other.name == model.name] or others[:1]
        together = [model, *(same if model.parent == chosen.folders[0] else [])]
        for name, setting in settings_of(model, chosen.provider).items():
            found = {each: checked(each, name, setting, chosen) for each in together}
            if not chosen.no_speed and not any(row["wrong"] for row in found.values()):
                race(together, setting, chosen, found)
            for row in found.values():
                row |= {"provider": chosen.provider, "onnxruntime": ort.__version__}
                row["device"] = CUDA.name() if chosen.provider == "cuda" else "CPU"
                print(json.dumps(row), flush=True)
                if chosen.json is not None:
                    with chosen.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            rows += found.values()
    print(table(rows))
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
