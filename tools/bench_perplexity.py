"""Perplexity of exported decoders on a text: what int4, and a cache in int8, cost an adapted model.

    python tools/bench_perplexity.py                         # train, export, compare (15 minutes)
    python tools/bench_perplexity.py --steps 40 --json rows.jsonl
    python tools/bench_perplexity.py FOLDER [FOLDER ...] [--text FILE]

Without folders: a Bone adapter on every linear layer of SmolLM2-135M learns every other topic of
Python's reference, and the exports are measured on the topics between. With folders and without
`--text`: the licence and copyright that Python prints. Windows do not overlap; the first token of
each is not scored. Runs on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

import argparse
import builtins
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from benching import AS_THE_BUILDER, measure, report, smollm2
from rich.console import Console

from bone_fx.runtime.session import open_session

ROOT = Path(__file__).parents[1]
COLUMNS = {
    "folder": "export",
    "perplexity": "perplexity",
    "of_first": "of the first",
    "tokens": "tokens",
    "model_bytes": "bytes",
}
EXPORTS = {
    "fp32": ["--dtype", "fp32"],
    "int8 cache": ["--kv-cache", "int8"],
    "int4": ["--dtype", "int4"],
    "int4 for cuda": ["--dtype", "int4", "--provider", "cuda"],
    "int4 symmetric": ["--dtype", "int4", "--symmetric"],
    "int4 to nearest": ["--dtype", "int4", "--calibration", "none"],
    "int4 as the builder": ["--dtype", "int4", *AS_THE_BUILDER["int4"]],
}
PROMPT = "The for statement is used to"
BATCH, LENGTH, LEARNING_RATE = 4, 128, 3e-4

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


def default_text() -> str:
    """The history and licence of Python as `license()` prints them."""
    printer: Any = builtins.license
    printer._Printer__setup()
    return "\n".join(printer._Printer__lines)


def perplexity(folder: Path, text: str, tokens: int, window: int) -> dict[str, Any]:
    """Perplexity of one exported decoder; seconds are those of the sessions' runs."""
    from tokenizers import Tokenizer

    session = open_session(folder / "model.onnx")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:tokens]
    loss, scored, seconds = 0.0, 0, 0.0
    for start in range(0, len(ids) - 1, window):
        part = np.array([ids[start : start + window]], dtype=np.int64)
        feeds = {
            i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtype=_DTYPES[i.type])
            for i in session.get_inputs()
            if i.name.startswith("past_key_values.")
        }
        feeds |= {"input_ids": part, "attention_mask": np.ones_like(part)}
        begin = time.perf_counter()
        logits = session.run(["logits"], feeds)[0][0, :-1].astype(np.float64)
        seconds += time.perf_counter() - begin
        peaks = logits.max(axis=-1)
        norms = peaks + np.log(np.exp(logits - peaks[:, None]).sum(axis=-1))
        targets = part[0, 1:]
        loss += float((norms - logits[np.arange(len(targets)), targets]).sum())
        scored += len(targets)
    return {
        "folder": folder.name,
        "perplexity": round(math.exp(loss / scored), 4),
        "tokens": scored,
        "model_bytes": sum(p.stat().st_size for p in folder.glob("model.onnx*")),
        "seconds": round(seconds, 2),
    }


def topics() -> tuple[str, str]:
    """Python's reference by topics, every other one: a text to learn and a text to measure on."""
    from pydoc_data.topics import topics as texts

    ordered = [texts[name] for name in sorted(texts)]
    return "\n\n".join(ordered[::2]), "\n\n".join(ordered[1::2])


def train(base: Path, folder: Path, text: str, steps: int, console: Console) -> None:
    """Train a Bone adapter on every linear layer, and save it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import bone_fx

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor(AutoTokenizer.from_pretrained(base)(text)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows))]
    example = {"input_ids": rows[:BATCH], "labels": rows[:BATCH]}
    config = bone_fx.BoneConfig(r=64, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = bone_fx.adapt(model, config, example).train()
    optimizer = torch.optim.AdamW(adapted.parameter_groups(weight_decay=0.0), lr=LEARNING_RATE)
    for step, part in enumerate(torch.split(rows, BATCH)[:steps]):
        optimizer.zero_grad()
        loss = adapted(input_ids=part, labels=part).loss
        loss.backward()
        optimizer.step()
        console.print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", style="dim")
    adapted.save_pretrained(folder)


def trained_exports(work: Path, steps: int, console: Console) -> list[Path]:
    """Folders of the exports of a base with a trained adapter folded in."""
    base = smollm2(work / "smollm2")
    adapter = work / f"adapter-trained-{steps}"
    if not (adapter / "adapter_model.safetensors").exists():
        train(base, adapter, topics()[0], steps, console)
    folders = []
    for name, flags in EXPORTS.items():
        console.print(f"export: {name}", style="dim")
        folders.append(work / "perplexity" / name)
        shutil.rmtree(folders[-1], ignore_errors=True)
        command: list[str | Path] = [sys.executable, "-m", "bone_fx", base, "--adapter", adapter]
        measure([*command, "-o", folders[-1], *flags, "--verify", "off", "-q"])
    return folders


def greedy_text(folder: Path) -> str:
    """What the model writes after a prompt, by onnxruntime-genai."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    config.clear_providers()  # of a folder for CUDA; the CPU runs it as well
    model = genai.Model(config)
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=48, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokenizer.encode(PROMPT))
    while not generator.is_done():
        generator.generate_next_token()
    return str(tokenizer.decode(generator.get_sequence(0)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, help="exported decoders")
    parser.add_argument("--text", type=Path, help="file to measure on")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100, help="of training, without folders")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder to use")
    chosen = parser.parse_args()
    folders = chosen.folders or trained_exports(chosen.work, chosen.steps, Console())
    if chosen.text:
        text = chosen.text.read_text(encoding="utf-8")
    else:
        text = default_text() if chosen.folders else topics()[1]
    rows = [perplexity(folder, text, chosen.tokens, chosen.window) for folder in folders]
    for row, folder in zip(rows, folders, strict=True):
        row["of_first"] = row["perplexity"] / rows[0]["perplexity"]
        row["text"] = greedy_text(folder)
        print(f"{folder.name}: {row['text']}\n")
    report("perplexity of exported decoders", rows, COLUMNS, chosen.json)


if __name__ == "__main__":
    main()
