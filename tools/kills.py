"""Kills runs of `bone-export` at random moments, and looks at what they leave.

    python tools/kills.py --kills 100 --seed 0 [--minutes M] [--state FILE] [--real SHARE]

After each kill the inputs must be as they were, the output whole, be it the old or the new one, the
exit status one of the table, and nothing may be left that the next run does not clear. A share of
the runs are processes of the real command, the others are forked. Exit status: 0 if all is well.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from campaign import (
    Run,
    import_everything,
    is_whole,
    make_inputs,
    print_table,
    remove,
    tree,
)

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL)
STATUS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGKILL: -9}
KINDS = {
    "fold": ["fold"],
    "export": ["--verify", "off"],
    "export, verified": ["--verify", "fast"],
}
LIMIT = 120
"""Seconds in which a run must end."""


def kill_one(
    number: int, seed: int, inputs: Path, work: Path, real: float
) -> tuple[str, list[str]]:
    """One kill; what it was, and what was wrong."""
    choose = random.Random(f"{seed}-{number}")
    kind, stop = choose.choice(sorted(KINDS)), choose.choice(SIGNALS)
    is_real, has_old = choose.random() < real, choose.random() < 0.5
    folder = work / f"kill-{number}"
    (folder / "new").mkdir(parents=True)
    (folder / "tmp").mkdir()
    out = folder / "new" / "out"
    arguments = [*KINDS[kind], str(inputs / "llama"), "--adapter", str(inputs / "llama-adapter")]
    arguments += ["-o", str(out), "--overwrite"]
    if has_old:
        Run([*arguments, "-q"], folder / "tmp", real=False).wait(LIMIT)
    old = tree(out) if has_old else None
    before = tree(inputs)
    run = Run(arguments, folder / "tmp", real=is_real)
    time.sleep(choose.random() * _typical_seconds(kind, is_real))
    run.send(stop)
    outcome = run.wait(LIMIT)
    wrong = []
    # Before Python runs our first line a signal ends the process as it ends any other.
    if outcome.code not in (0, STATUS[stop], -stop):
        wrong.append(f"exit status {outcome.code}: {outcome.err[-300:]}")
    if outcome.hung:
        wrong.append("it hung")
    if "Traceback" in outcome.out + outcome.err and outcome.code != -signal.SIGINT:
        wrong.append("a traceback")
    if tree(inputs) != before:
        wrong.append("the inputs changed")
    wrong += _wrong_output(out, old, outcome.code, is_killed=stop == signal.SIGKILL)
    left = sorted(set(os.listdir(folder / "new")) - {"out"})
    if left and outcome.code not in (-signal.SIGKILL, -stop):
        wrong.append(f"left: {left}")
    final = Run([*arguments, "-q"], folder / "tmp", real=False).wait(LIMIT)
    if final.code != 0 or os.listdir(folder / "new") != ["out"] or not is_whole(out):
        wrong.append(f"the next run: {final.code}, {os.listdir(folder / 'new')} {final.err[-300:]}")
    remove(folder)
    return f"{stop.name} -> {outcome.code}", wrong


def _wrong_output(
    out: Path, old: dict[str, str] | None, code: int, *, is_killed: bool
) -> list[str]:
    if code == 0:
        return [] if is_whole(out) else ["the output is not whole"]
    if is_killed:
        # Between two renames, where the system has no exchange, the next run puts the old one back.
        return [] if not out.exists() or is_whole(out) else ["the output is not whole"]
    if old is None:
        return ["there is an output"] if out.exists() else []
    return [] if out.exists() and tree(out) == old else ["the earlier output changed"]


def _typical_seconds(kind: str, real: bool) -> float:
    """About as long as such a run takes, and a bit."""
    seconds = {"fold": 0.6, "export": 1.6, "export, verified": 2.4}[kind]
    return seconds + (4.0 if real else 0.0)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 0 if nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--real", type=float, default=0.2, help="share of runs of the command")
    parser.add_argument("--state", type=Path, help="file to go on from")
    chosen = parser.parse_args(arguments)
    state: dict[str, Any] = {"next": 0, "outcomes": {}, "wrong": []}
    if chosen.state is not None and chosen.state.exists():
        state = json.loads(chosen.state.read_text())
    outcomes, end = Counter(state["outcomes"]), time.monotonic() + 60 * chosen.minutes
    with tempfile.TemporaryDirectory(prefix="kills-") as top:
        inputs = Path(top) / "inputs"
        import_everything()
        make_inputs(inputs)
        for number in range(state["next"], chosen.kills):
            if time.monotonic() > end:
                break
            name, wrong = kill_one(number, chosen.seed, inputs, Path(top), chosen.real)
            outcomes[name] += 1
            state["wrong"] += [f"kill {number} ({name}): {each}" for each in wrong]
            state |= {"next": number + 1, "outcomes": dict(outcomes)}
            if chosen.state is not None:
                chosen.state.write_text(json.dumps(state))
    print_table("signal and exit status", dict(sorted(outcomes.items())))
    print(f"\n{sum(outcomes.values())} kills, {len(state['wrong'])} wrong")
    for each in state["wrong"]:
        print(f"  {each}")
    return 1 if state["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
