"""Perplexity of exported decoders on a text, one JSON row a folder.

    python tools/bench_perplexity.py FOLDER [FOLDER ...] [--text FILE] [--tokens N] [--window N]

Without `--text`: the licence and copyright that Python prints. Windows do not overlap; the first
token of each is not scored. Runs on ONNX Runtime's CPU provider.
"""

from __future__ import annotations

import argparse
import builtins
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from bone_fx.runtime.session import open_session

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


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


def main() -> None:
    """Print a row a folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    chosen = parser.parse_args()
    text = chosen.text.read_text(encoding="utf-8") if chosen.text else default_text()
    for folder in chosen.folders:
        print(json.dumps(perplexity(folder, text, chosen.tokens, chosen.window)), flush=True)


if __name__ == "__main__":
    main()
