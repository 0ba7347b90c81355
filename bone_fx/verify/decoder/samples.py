"""Negative log-likelihood a token of the user's own texts: base, adapter and export side by side.

Shape letters: B texts, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bone_fx.verify.decoder.running import alone, empty_past, step_of

if TYPE_CHECKING:
    import onnxruntime

Texts = Sequence[Sequence[int]]


def torch_likelihood(model: nn.Module, texts: Texts) -> float:
    """Mean negative log-likelihood of the tokens of texts after their first, in nats."""
    return _mean(alone(model, texts), texts)


def graph_likelihood(session: onnxruntime.InferenceSession, texts: Texts) -> float | None:
    """The same of a graph; None if it gives the logits of last tokens only."""
    every = []
    for text in texts:
        ids = np.array([text], dtype=np.int64)
        logits, _ = step_of(session, ids, np.ones_like(ids), empty_past(session, 1))
        if logits.shape[1] != len(text):
            return None
        every.append(logits[0])
    return _mean(every, texts)


def _mean(logits_SV: Sequence[Tensor], texts: Texts) -> float:
    losses = [
        nn.functional.cross_entropy(logits[:-1], torch.tensor(list(text[1:])), reduction="sum")
        for logits, text in zip(logits_SV, texts, strict=True)
    ]
    return float(sum(losses)) / sum(len(text) - 1 for text in texts)
