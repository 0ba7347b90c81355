"""What a layer adds to capture, lowering and translation, for an architecture of the tests.

Models of 4 and of 32 tiny layers take turns, after one run of each that is not timed.

    python tools/bench_layers.py
    python tools/bench_layers.py qwen3 mixtral gpt_oss --rounds 7 --json rows.jsonl
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benching import interleave, ratios, report, spread
from rich.console import Console

from bone_fx.capture.decoder.capture_decoder import capture_decoder

sys.path.insert(0, str(Path(__file__).parents[1]))
_tests: Any = import_module("tests.capture.decoder.decoding")
_rows: Any = import_module("tests.capture.decoder.decoders")

FEW, MANY = 4, 32
COLUMNS = {
    "name": "architecture",
    "few_s": f"{FEW} layers, s",
    "many_s": f"{MANY} layers, s",
    "ratio": "ratio",
    "layer_ms": "added layer, ms",
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {row.name: row for row in _rows.DECODERS}
    parser.add_argument("names", nargs="*", default=["llama"], metavar="NAME", help="llama")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(known)):
        parser.error(f"not among the tests' decoders: {', '.join(unknown)}")
    rows = []
    for name in arguments.names:
        legs = {f"{name}, {n} layers": _leg(known[name], n) for n in (FEW, MANY)}
        for leg in legs.values():
            leg()
        few, many = interleave(legs, arguments.rounds, Console()).values()
        added = [(b - a) / (MANY - FEW) * 1e3 for a, b in zip(few, many, strict=True)]
        row = {"name": name, "few_s": spread(few), "many_s": spread(many)}
        rows.append({**row, "ratio": ratios(many, few), "layer_ms": spread(added)})
    report("cost of a layer", rows, COLUMNS, arguments.json)


def _leg(row: Any, layers: int) -> Callable[[], float]:
    model = row.build(num_hidden_layers=layers)
    skeleton = _tests.skeleton_of(model)

    def run() -> float:
        start = time.perf_counter()
        _tests.onnx_of(capture_decoder(skeleton), model)
        return time.perf_counter() - start

    return run


if __name__ == "__main__":
    main()
