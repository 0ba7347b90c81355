"""Damages inputs of `bone-export` at random, and looks at what it makes of them.

    python tools/fuzz.py --count 5000 --seed 0 [--minutes M] [--state FILE] [--real SHARE]
    python tools/fuzz.py --count 500 --adapters lora

Whatever the input: no traceback, no hang above 60 s, no more than 2 GB of memory, an exit status of
the table and no fault (70), nothing unprintable on the terminal, one JSON object with `--json`, the
inputs as they were, nothing of a file outside in the output, nothing left beside it. Most runs are
forked, a share are processes of the real command. Exit status: 0 if all is well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from campaign import (
    EXIT_CODES,
    Outcome,
    Run,
    import_everything,
    is_whole,
    make_inputs,
    print_table,
    remove,
    tree,
)
from damage import SECRET, damage

SECONDS, BYTES = 60, 2 << 30
MODELS = ("llama", "llama", "sharded", "gpt2", "bert", "gguf")
DAMAGES = (0, *[1] * 8, *[2] * 4, *[3] * 3)
OUTPUTS = [
    *["out"] * 160,
    *("new/deep/out", "out/", "./out", "a b", "é", "x" * 237, "x" * 238, "x" * 255, "x" * 300),
    *("base", "adapter", ".", "..", "", "base/config.json", "out\n\x1b[31mred", "\udcff\udcfe"),
    *("link", "file", "pipe", "/dev/null", "/proc/out", "tmp/../out", "-", "loop"),
]
CAPTURED = "capture without weights"


def fuzz_one(
    number: int, seed: int, inputs: Path, work: Path, real: float, kind: str = "adapter"
) -> tuple[Outcome, list[str]]:
    """One damaged input: how the run ended, and what was wrong."""
    choose = random.Random(f"{seed}-{number}")
    folder = work / f"case-{number}"
    folder.mkdir()
    try:
        arguments, done = _prepare(choose, folder, inputs, kind)
        before = tree(folder)
        run = Run(arguments, folder / "tmp", real=choose.random() < real)
        outcome = run.wait(SECONDS)
        wrong = [
            *_wrong_end(outcome, is_json="--json" in arguments),
            *_wrong_files(folder, before, outcome.code),
        ]
        what = f"case {number}: {' '.join(map(ascii, arguments))}; {'; '.join(done)}"
        return outcome, [f"{each} [{what}]" for each in wrong]
    finally:
        remove(folder)


def _prepare(
    choose: random.Random, folder: Path, inputs: Path, kind: str
) -> tuple[list[str], list[str]]:
    """Lay out damaged copies of the inputs; the arguments, and what was damaged."""
    import shutil

    name = choose.choice(MODELS)
    model = "llama" if name == "gguf" else name
    shutil.copytree(inputs / model, folder / "base")
    shutil.copytree(inputs / f"{model}-{kind}", folder / "adapter")
    if name == "gguf":
        shutil.copyfile(inputs / "base.gguf", folder / "base.gguf")
    (folder / "tmp").mkdir()
    (folder / "file").write_text("mine")
    (folder / "secret").write_text(SECRET)
    (folder / "link").symlink_to("elsewhere")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    done = [damage(choose, folder) for _ in range(choose.choice(DAMAGES))]
    base = "base.gguf" if name == "gguf" else "base"
    out = choose.choice(OUTPUTS)
    out = out if out.startswith("/") or not out else str(folder / out)
    arguments = [str(folder / base), "-o", out]
    adapters = choose.choice((0, *[1] * 8, 2))
    for adapter in ("adapter", "second")[:adapters]:
        arguments += ["--adapter", str(folder / adapter)]
    if adapters == 2:
        shutil.copytree(inputs / f"{model}-adapter", folder / "second")  # a Bone
    if adapters and choose.random() < 0.5:
        arguments.insert(0, "fold")
    else:
        arguments += ["--verify", choose.choice((*["off"] * 6, "fast", "full"))]
        if choose.random() < 0.3:
            arguments += ["--dtype", choose.choice(("fp16", "int4", "int8"))]
    arguments += [flag for flag in ("--json", "--overwrite") if choose.random() < 0.4]
    flags = ("-q", "--last-token-logits", "--head=int8", "--revision=x")
    arguments += [flag for flag in flags if choose.random() < 0.02]
    return arguments, done


def _wrong_end(outcome: Outcome, *, is_json: bool) -> list[str]:
    wrong = []
    said = outcome.out + outcome.err
    if outcome.hung:
        wrong.append(f"no end after {SECONDS} s: {outcome.err[-2000:]!a}")
    elif outcome.code not in EXIT_CODES:
        wrong.append(f"exit status {outcome.code}: {outcome.err[-400:]!a}")
    if "Traceback" in said:
        wrong.append(f"a traceback: {outcome.err[-400:]!a}")
    if outcome.memory > BYTES or "out of memory" in said:
        wrong.append(f"{outcome.memory / 1e9:.1f} GB of memory")
    if not all(c.isprintable() or c == "\n" for c in said):
        wrong.append("something unprintable on the terminal")
    if len(outcome.err) > 20_000:
        wrong.append("a dump on the terminal")
    if is_json and not outcome.hung:
        try:
            content = json.loads(outcome.out)
            if outcome.code and content["exit_code"] != outcome.code:
                wrong.append("another exit status in the JSON")
        except (ValueError, KeyError):
            wrong.append(f"no JSON: {outcome.out[:200]!a}")
    return wrong


def _wrong_files(folder: Path, before: dict[str, str], code: int) -> list[str]:
    wrong = []
    after = {name: content for name, content in tree(folder).items() if _counts(name)}
    lost = [
        name for name, content in before.items() if _counts(name) and after.get(name) != content
    ]
    if lost:
        wrong.append(f"changed: {lost[:5]}")
    new = sorted(set(after) - set(before))
    outputs = {name for name in new if name.endswith("bone_export.json")}
    kept = {name for name in outputs if ".rejected/" in name}
    if code == 0 and len(outputs) != 1:
        wrong.append(f"exit status 0 and {len(outputs)} outputs")
    if code != 0 and outputs - kept:
        wrong.append("published, and another exit status than 0")
    for name in outputs - kept:
        wrong += [] if is_whole((folder / name).parent) else ["the output is not whole"]
    places = {os.path.dirname(name) for name in outputs}
    left = [
        name
        for name in new
        if not any(
            name == p or name.startswith(f"{p}/") or p.startswith(f"{name}/") for p in places
        )
    ]
    if left:
        wrong.append(f"left: {left[:5]}")
    for name in new:
        path = os.fsencode(folder / name)
        if os.path.isfile(path):
            with open(path, "rb") as file:
                if SECRET.encode() in file.read():
                    wrong.append(f"the content of a file outside in {name}")
    return wrong


def _counts(name: str) -> bool:
    return not name.startswith(("tmp/", "tmp."))


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", choices=["bone", "lora"], default="bone")
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--real", type=float, default=0.1, help="share of runs of the command")
    parser.add_argument("--state", type=Path, help="file to go on from")
    chosen = parser.parse_args(arguments)
    state: dict[str, Any] = {
        "next": chosen.first,
        "outcomes": {},
        "captured": 0,
        "slowest": 0.0,
        "wrong": [],
    }
    if chosen.state is not None and chosen.state.exists():
        state = json.loads(chosen.state.read_text())
    kind = {"bone": "adapter", "lora": "lora"}[chosen.adapters]
    outcomes, end = Counter(state["outcomes"]), time.monotonic() + 60 * chosen.minutes
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        inputs = Path(top) / "inputs"
        os.environ["BONE_FX_CACHE"] = str(Path(top) / "cache")
        import_everything()
        make_inputs(inputs)
        for number in range(state["next"], chosen.first + chosen.count):
            if time.monotonic() > end:
                break
            outcome, wrong = fuzz_one(number, chosen.seed, inputs, Path(top), chosen.real, kind)
            outcomes[str(outcome.code)] += 1
            state["captured"] += CAPTURED in outcome.err
            state["slowest"] = max(state["slowest"], outcome.seconds)
            state["wrong"] += wrong
            state |= {"next": number + 1, "outcomes": dict(outcomes)}
            for each in wrong:
                print(each, flush=True)
            if chosen.state is not None:
                chosen.state.write_text(json.dumps(state))
    print_table("exit status", dict(sorted(outcomes.items())))
    print(
        f"\n{sum(outcomes.values())} inputs, {state['captured']} reached the capture, "
        f"the slowest took {state['slowest']:.0f} s, {len(state['wrong'])} wrong"
    )
    return 1 if state["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
