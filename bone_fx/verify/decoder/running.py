"""A decoder run once: the torch model on whole texts, a session on a step or greedily.

Shape letters: B batch, S new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bone_fx.verify.decoder.quantized_cache import QuantizedCache, rows_of_codes
from bone_fx.verify.decoder.routes import Choices, Routed, Routes, joined
from bone_fx.verify.parity import Generated

if TYPE_CHECKING:
    import onnxruntime

NUMPY_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


def alone(
    model: nn.Module, rows: Sequence[Sequence[int]], kept: QuantizedCache | None = None
) -> list[Tensor]:
    """Logits `[S, V]` of each row by itself; keys and values are rounded as a graph kept them."""

    def rounds() -> dict[str, Any]:
        return {} if kept is None else {"past_key_values": kept.cache(model.config)}

    with torch.no_grad():
        return [
            model(
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                **rounds(),
            )
            .logits[0]
            .float()
            for row in rows
        ]


def routed(
    model: nn.Module,
    row: Sequence[int],
    routes: Sequence[Tensor],
    tolerance: float,
    case: str = "",
    kept: QuantizedCache | None = None,
) -> tuple[Tensor, Routes]:
    """Logits `[S, V]` of a row whose tokens go to some experts, and all that were chosen.

    Keys and values are rounded as a graph kept them; None for a cache in floats.
    """
    with Routed(model, len(row), routes, tolerance, case) as choices:
        [logits] = alone(model, [row], kept)
    return logits, choices.made


def together(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """Logits `[S, V]` of rows in one batch without padding; None of a model that chooses experts.

    Shorter rows are repeated until they are as long as the longest: what comes later changes
    nothing before it in a model that has a cache.
    """
    longest = max(map(len, rows))
    ids = torch.tensor([(list(row) * longest)[:longest] for row in rows])
    whole: Any = model
    with torch.no_grad(), Routed(model, ids.numel(), ()) as choices:
        logits = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.float()
    if choices.made:
        return None
    return [of_row[: len(row)] for of_row, row in zip(logits, rows, strict=True)]


@dataclass(frozen=True)
class Generation(Generated):
    """What a graph generated greedily, and how it came to it.

    Attributes:
        routes: The experts that it chose for the prompt and all tokens but the last.
        kept: What it kept of these; None of a cache in floats.
    """

    routes: Routes
    kept: QuantizedCache | None


def generate(
    session: onnxruntime.InferenceSession,
    choices: Choices,
    prompt: Sequence[int],
    count: int,
    cache: QuantizedCache | None = None,
) -> Generation:
    """Generate tokens greedily with a graph.

    Args:
        session: A session of the graph.
        choices: The nodes whose choice of experts it shows.
        prompt: Tokens that it begins with.
        count: How many it generates.
        cache: How the graph keeps its cache in 8 bits; None for floats.
    """
    past, tokens, margins, chosen = empty_past(session, 1), list(prompt), [], []
    ids = np.array([prompt], dtype=np.int64)
    for _ in range(count):
        outputs = outputs_of(session, ids, np.ones((1, len(tokens)), dtype=np.int64), past)
        past = past_of(outputs)
        chosen.append([each[0] for each in choices.read(outputs, ids.shape)])
        logits = logits_of(outputs)[0, -1]
        two = logits.topk(2)
        margins.append(float((two.values[0] - two.values[1]) / logits.abs().max()))
        tokens.append(int(two.indices[0]))
        ids = np.array([tokens[-1:]], dtype=np.int64)
    [kept] = rows_of_codes(cache, past, [len(tokens) - 1])
    return Generation(list(prompt), tokens[len(prompt) :], margins, joined(chosen), kept)


def step_of(
    session: onnxruntime.InferenceSession, ids: Any, mask: Any, past: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """The logits `[B, S, V]` of a run, and the past of the next one."""
    values = outputs_of(session, ids, mask, past)
    return logits_of(values), past_of(values)


def outputs_of(
    session: onnxruntime.InferenceSession, ids: Any, mask: Any, past: dict[str, Any]
) -> dict[str, Any]:
    """All outputs of a run, by name."""
    names = [output.name for output in session.get_outputs()]
    feeds = {"input_ids": ids, "attention_mask": mask, **past}
    inputs = {i.name for i in session.get_inputs()}
    arrays = session.run(None, {k: v for k, v in feeds.items() if k in inputs})
    return dict(zip(names, arrays, strict=True))


def logits_of(values: dict[str, Any]) -> Tensor:
    """The logits `[B, S, V]` among the outputs of a run."""
    return torch.from_numpy(values["logits"]).float()


def past_of(values: dict[str, Any]) -> dict[str, Any]:
    """The cache among the outputs of a run, as the next one takes it."""
    return {
        name.replace("present.", "past_key_values."): value
        for name, value in values.items()
        if name.startswith("present.")
    }


def empty_past(
    session: onnxruntime.InferenceSession, batch: int, positions: int = 0
) -> dict[str, Any]:
    """Zeros for each input of the cache."""
    return {
        value.name: np.zeros(
            (batch, value.shape[1], positions, value.shape[3]), dtype=NUMPY_DTYPES[value.type]
        )
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
