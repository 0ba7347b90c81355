"""Verification of a decoder graph.

Prefill and decode, batches of one and three, ragged rows, past 0 and past > 0.

The reference runs every row alone, unpadded and without a cache, so that padding, masks, positions
and the cache of the graph are all on trial.

Shape letters: B batch, S new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bone_fx.sites import LinearSite
from bone_fx.verify.compare_quantized import ROUNDED_ACTIVATIONS, Written
from bone_fx.verify.parity import TOLERANCE, Parity, check_effect
from bone_fx.verify.ranges import within_range
from bone_fx.verify.reference import Adapters, fold_in_place, load_heads, unmerged

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True)
class Case:
    """Rows of prompts of these lengths, right-padded to the longest, then decode steps."""

    name: str
    lengths: tuple[int, ...]
    steps: int


CASES = (
    Case("batch 1, length 5, past 0 and 2 steps with a past", (5,), 2),
    Case("batch 3, ragged lengths 11, 4 and 7, past 0 and 3 steps with a past", (11, 4, 7), 3),
)


def verify_decoder(
    session: onnxruntime.InferenceSession,
    model: nn.Module,
    sites: Mapping[str, LinearSite],
    adapters: Adapters,
    *,
    dtype: str,
    vocab_size: int,
    context_length: int | None = None,
    short: bool = False,
    written: Written | None = None,
) -> Parity:
    """Compare a session with the base model under its adapters.

    Args:
        session: The exported graph; inputs and outputs named as onnxruntime-genai names them.
        model: The base model in float32 and eval mode; it is folded in place and must not be used
            afterwards.
        sites: The model's sites by name.
        adapters: Adapters by name, in the order in which they apply.
        dtype: `"fp32"` or `"fp16"`, which sets the tolerance.
        vocab_size: V, the range of the random token ids.
        context_length: Positions that the graph holds for; cases beyond it are left out.
        short: Run only the first case.
        written: The graph's quantized weights; the graph is then held to torch with these.

    Raises:
        VerificationError: Two of the three disagree, or a value is not finite.
    """
    parity = Parity(TOLERANCE[dtype])
    cases = [
        c for c in CASES if context_length is None or max(c.lengths) + c.steps <= context_length
    ]
    cases = cases[:1] if short else cases
    rows = [_random_rows(case, vocab_size, seed) for seed, case in enumerate(cases)]
    base = [_alone(model, r) for r in rows] if adapters else []
    load_heads(model, adapters)
    with unmerged(model, sites, adapters), within_range(model, dtype):
        reference = [_alone(model, r) for r in rows]
    fold_in_place(model, sites, adapters)
    folded = [_alone(model, r) for r in rows] if adapters else reference
    for number, case in enumerate(cases):
        for row, (one, other) in enumerate(zip(folded[number], reference[number], strict=True)):
            parity.compare(
                "unmerged_vs_folded", f"{case.name}, row {row}", one, other, TOLERANCE["fp32"]
            )
    references = {"onnx_vs_unmerged": reference, "onnx_vs_folded": folded}
    if written is None:
        _compare(parity, session, cases, rows, references, parity.tolerance)
    else:
        written.load_into(model)
        quantized = {"onnx_vs_written": [_alone(model, r) for r in rows]}
        _compare(parity, written.exact or session, cases, rows, quantized, parity.tolerance)
        if written.exact is not None:
            rounded = {"rounded_activations": quantized["onnx_vs_written"]}
            _compare(parity, session, cases, rows, rounded, ROUNDED_ACTIVATIONS)
        _compare(parity, session, cases, rows, references, math.inf)
    check_effect(
        parity,
        [
            (a, b)
            for one, other in zip(base, reference, strict=False)
            for a, b in zip(one, other, strict=True)
        ],
    )
    return parity


def _compare(
    parity: Parity,
    session: onnxruntime.InferenceSession,
    cases: Sequence[Case],
    rows: Sequence[list[list[int]]],
    references: Mapping[str, Sequence[Sequence[Tensor]]],
    tolerance: float,
) -> None:
    """Compare a session's logits in every case with logits `[S, V]` by pair, case and row."""
    for number, case in enumerate(cases):
        for step, row, position, logits in _run(session, case, rows[number]):
            expected = slice(position, position + logits.shape[0])
            for pair, reference in references.items():
                where = f"{case.name}: {step}, row {row}"
                parity.compare(pair, where, logits, reference[number][row][expected], tolerance)


def _random_rows(case: Case, vocab_size: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, vocab_size, (length + case.steps,), generator=generator).tolist()
        for length in case.lengths
    ]


def _alone(model: nn.Module, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[S, V]` of each row by itself."""
    with torch.no_grad():
        return [
            model(
                input_ids=torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
            )
            .logits[0]
            .float()
            for row in rows
        ]


def _run(session: onnxruntime.InferenceSession, case: Case, rows: list[list[int]]) -> Any:
    """Yield (step name, row, first position, logits `[S, V]`) of the prefill and each step."""
    longest = max(case.lengths)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(case.lengths):
        ids[row, :length] = rows[row][:length]
        mask[row, :length] = 1
    past = _empty_past(session, len(rows))
    logits, past = _step(session, ids, mask, past)
    for row, length in enumerate(case.lengths):
        if logits.shape[1] == 1:  # of the last token only
            yield "prefill", row, length - 1, logits[row]
        else:
            yield "prefill", row, 0, logits[row, :length]
    for step in range(case.steps):
        ids = np.array(
            [[rows[row][length + step]] for row, length in enumerate(case.lengths)], dtype=np.int64
        )
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        logits, past = _step(session, ids, mask, past)
        for row, length in enumerate(case.lengths):
            yield f"decode step {step + 1}", row, length + step, logits[row]


def _step(
    session: onnxruntime.InferenceSession, ids: Any, mask: Any, past: dict[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    names = [output.name for output in session.get_outputs()]
    feeds = {"input_ids": ids, "attention_mask": mask, **past}
    inputs = {i.name for i in session.get_inputs()}
    values = dict(
        zip(names, session.run(None, {k: v for k, v in feeds.items() if k in inputs}), strict=True)
    )
    presents = {
        name.replace("present.", "past_key_values."): value
        for name, value in values.items()
        if name.startswith("present.")
    }
    return torch.from_numpy(values["logits"]).float(), presents


def _empty_past(session: onnxruntime.InferenceSession, batch: int) -> dict[str, Any]:
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=kinds[value.type])
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
