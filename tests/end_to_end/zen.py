"""The Zen of Python, real text that the standard library carries (module `this`, rot13)."""

from __future__ import annotations

import codecs
import contextlib
import importlib
import io
from pathlib import Path

import torch
from torch import Tensor


def zen() -> str:
    """The poem."""
    with contextlib.redirect_stdout(io.StringIO()):
        text: str = importlib.import_module("this").s
    return codecs.decode(text, "rot13")


def zen_batch(folder: Path, rows: int, length: int, start: int = 0) -> dict[str, Tensor]:
    """Rows of consecutive tokens of the poem, with labels."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(zen())["input_ids"]
    cuts = [(start + row * length) % (len(ids) - length) for row in range(rows)]
    batch = torch.tensor([ids[cut : cut + length] for cut in cuts])
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch), "labels": batch}
