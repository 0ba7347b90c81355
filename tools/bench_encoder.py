"""An encoder through ONNX Runtime on the CPU: our graph and the one of ONNX Runtime's optimizer.

The other graph is what `onnxruntime.transformers.optimizer` makes of an ordinary export by
`torch.onnx` of the same weights, unless one is given. Runs are interleaved in one process; half of
the first sentence is padding.

    python tools/bench_encoder.py OURS/model.onnx BASE
    python tools/bench_encoder.py OURS/model.onnx OTHER.onnx --threads 1 --rounds 9 --json r.jsonl
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
from benching import count_nodes, interleave, ratios, report, spread
from building import optimized_encoder
from rich.console import Console

SHAPES = ((1, 16), (8, 128), (32, 64))
COLUMNS = {
    "shape": "batch x length",
    "ours_ms": "ours, ms",
    "other_ms": "other, ms",
    "ratio": "ours / other",
    "ours_nodes": "nodes",
    "other_nodes": "nodes of the other",
}


def main() -> None:
    """Measure every shape and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ours", type=Path)
    parser.add_argument("other", type=Path, help="a model file, or the base's folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        if given.other.is_dir():
            given.other = optimized_encoder(given.other, Path(folder))
        compare(given)


def compare(given: argparse.Namespace) -> None:
    """Measure both graphs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = given.threads
    providers = ["CPUExecutionProvider"]
    sessions = {
        name: ort.InferenceSession(str(path), options, providers=providers)
        for name, path in (("ours", given.ours), ("other", given.other))
    }
    nodes = {"ours_nodes": count_nodes(given.ours), "other_nodes": count_nodes(given.other)}
    rows = []
    for batch, length in SHAPES:
        ids = np.random.default_rng(0).integers(5, 999, (batch, length))
        mask = np.ones_like(ids)
        mask[0, length // 2 :] = 0
        feeds = {"input_ids": ids, "attention_mask": mask}
        legs = {name: partial(milliseconds, s, feeds) for name, s in sessions.items()}
        for leg in legs.values():
            leg()
        times = interleave(legs, given.rounds, Console(quiet=True))
        rows.append(
            {
                "shape": f"{batch} x {length}",
                "ours_ms": spread(times["ours"]),
                "other_ms": spread(times["other"]),
                "ratio": ratios(times["ours"], times["other"]),
                "threads": given.threads,
                **nodes,
            }
        )
    report("encoder", rows, COLUMNS, given.json)


def milliseconds(session: ort.InferenceSession, feeds: dict[str, np.ndarray]) -> float:
    """Wall time of one run."""
    start = time.perf_counter()
    session.run(None, feeds)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
