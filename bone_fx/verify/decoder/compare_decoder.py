"""Verification of a decoder graph.

The reference runs every row alone, unpadded and without a cache, so that padding, masks, positions
and the cache of the graph are all on trial. Long texts are met on the first layers alone
(`verify.decoder.long_texts`).

Shape letters: B batch, S new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError, first_line
from bone_fx.verify.cases import Case, decoder_cases, rows_of
from bone_fx.verify.compare_quantized import ROUNDED_ACTIVATIONS, Written
from bone_fx.verify.decoder.long_texts import verify_long_texts
from bone_fx.verify.decoder.routes import ROUTED, UNDECIDED, Routes, say_undecided
from bone_fx.verify.decoder.running import alone, empty_past, step_of
from bone_fx.verify.decoder.samples import graph_likelihood, torch_likelihood
from bone_fx.verify.graph import Edit, WrittenGraph, keep_activations
from bone_fx.verify.locate import first_difference, located
from bone_fx.verify.parity import SMALLEST, TOLERANCE, Parity, check_effect
from bone_fx.verify.ranges import within_range
from bone_fx.verify.reference import Adapters, fold_in_place, load_parameters, unmerged

if TYPE_CHECKING:
    import onnxruntime

_GREEDY_TOKENS = 8


@dataclass(frozen=True)
class DecoderChecks:
    """How a decoder is verified.

    Attributes:
        dtype: `"fp32"` or `"fp16"`, which sets the tolerance.
        vocab_size: V, the range of random token ids.
        context_length: Positions that the graph holds for; cases beyond it are left out.
        short: Run the short cases only, and no long text.
        text: Token ids of a real text, which stand in the place of random ones.
        samples: Token ids of texts of the user's, whose likelihood is a figure.
    """

    dtype: str
    vocab_size: int
    context_length: int | None = None
    short: bool = False
    text: tuple[int, ...] = ()
    samples: tuple[tuple[int, ...], ...] = ()


def verify_decoder(
    graph: WrittenGraph,
    model: nn.Module,
    adapters: Adapters,
    checks: DecoderChecks,
    written: Written | None = None,
) -> Parity:
    """Compare a graph with the base model under its adapters.

    Args:
        graph: The exported graph; inputs and outputs named as onnxruntime-genai names them.
        model: The base model in float32 and eval mode; it is folded in place and must not be used
            afterwards.
        adapters: The adapters as verification read them, in the order in which they apply.
        checks: What is run.
        written: The graph's quantized weights; the graph is then held to torch with these.

    Raises:
        VerificationError: Two of the three disagree, or a value is not finite.
    """
    parity = Parity(TOLERANCE[checks.dtype], SMALLEST[checks.dtype])
    cases = decoder_cases(model.config, checks.context_length, short=checks.short)
    rows = [
        rows_of(case, checks.vocab_size, seed, checks.text if seed else ())
        for seed, case in enumerate(cases)
    ]
    base = [alone(model, r) for r in rows[:2]] if adapters else []
    if checks.samples and adapters:
        parity.figures["nll_base"] = torch_likelihood(model, checks.samples)
    load_parameters(model, adapters)
    with unmerged(model, adapters), within_range(model, checks.dtype):
        reference = [alone(model, r) for r in rows]
        if checks.samples:
            name = "nll_adapter" if adapters else "nll_base"
            parity.figures[name] = torch_likelihood(model, checks.samples)
    fold_in_place(model, adapters)
    folded = [alone(model, r) for r in rows] if adapters else reference
    for case, ones, others in zip(cases, folded, reference, strict=True):
        for row, (one, other) in enumerate(zip(ones, others, strict=True)):
            where = f"{case.name}, row {row}"
            parity.compare("unmerged_vs_folded", where, one, other, TOLERANCE["fp32"])
    decided = [_decided(model, r, parity.tolerance) for r in rows]
    say_undecided(parity, sum(map(sum, decided)), sum(len(ids) for r in rows for ids in r))
    runs = _Runs(parity, cases, rows, decided, graph, model)
    references = {"onnx_vs_unmerged": reference, "onnx_vs_folded": folded}
    edits: tuple[Edit, ...] = ()
    if written is None:
        runs.compare((), references, parity.tolerance)
    else:
        written.load_into(model)
        quantized = {"onnx_vs_written": [alone(model, r) for r in rows]}
        if graph.rounds_activations():
            edits = (keep_activations,)
            rounded = {"rounded_activations": quantized["onnx_vs_written"]}
            runs.compare((), rounded, ROUNDED_ACTIVATIONS)
        runs.compare(edits, quantized, parity.tolerance)
        runs.compare((), references, math.inf)
    if not checks.short:
        verify_long_texts(parity, graph, edits, model, checks.context_length)
        _compare_greedy(parity, graph.session(*edits), model, rows[0][0])
    likelihood = graph_likelihood(graph.session(), checks.samples) if checks.samples else None
    if likelihood is not None:
        parity.figures["nll_export"] = likelihood
    effects = [
        (a, b)
        for one, other in zip(base, reference, strict=False)
        for a, b in zip(one, other, strict=True)
    ]
    check_effect(parity, effects)
    return parity


@dataclass(frozen=True)
class _Runs:
    """Cases, the token ids of their rows, and who runs them."""

    parity: Parity
    cases: Sequence[Case]
    rows: Sequence[list[list[int]]]
    decided: Sequence[list[int]]
    graph: WrittenGraph
    model: nn.Module

    def compare(
        self,
        edits: Sequence[Edit],
        references: Mapping[str, Sequence[Sequence[Tensor]]],
        tolerance: float,
    ) -> None:
        """Compare a graph's logits with logits `[S, V]` by pair, case and row."""
        session = self.graph.session(*edits)
        for number, case in enumerate(self.cases):
            try:
                outputs = list(_run(session, case, self.rows[number]))
            except Exception as error:  # of ONNX Runtime, whose classes have no common one
                if case.buffer is None or self.graph.shares_a_buffer():
                    raise _refused(case, error) from error
                self.parity.skip(case.name, first_line(error))
                continue
            for step, row, position, logits in outputs:
                decided = max(0, self.decided[number][row] - position)
                for pair, reference in references.items():
                    where = f"{case.name}: {step}, row {row}"
                    values = reference[number][row][position : position + len(logits)]
                    try:
                        self.parity.compare(
                            pair, where, logits[:decided], values[:decided], tolerance
                        )
                    except VerificationError as error:
                        ids = self.rows[number][row][: position + len(logits)]
                        raise located(error, self._where(edits, ids, tolerance)) from None
                    if decided < len(logits):
                        rest = logits[decided:], values[decided:]
                        self.parity.compare(ROUTED, where, *rest, max(UNDECIDED, tolerance))
                    self.parity.compare_choices(pair, logits, values)

    def _where(self, edits: Sequence[Edit], ids: list[int], tolerance: float) -> str | None:
        """The first layer that differs on some tokens, all at once or the last after the others."""
        for cached in (0, len(ids) - 1):

            def run(session: onnxruntime.InferenceSession, cached: int = cached) -> Sequence[Any]:
                past = empty_past(session, 1)
                if cached:
                    before = np.array([ids[:cached]], dtype=np.int64)
                    _, past = step_of(session, before, np.ones_like(before), past)
                feeds = {
                    "input_ids": np.array([ids[cached:]], dtype=np.int64),
                    "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
                    **past,
                }
                inputs = {value.name for value in session.get_inputs()}
                arrays: list[Any] = session.run(
                    None, {k: v for k, v in feeds.items() if k in inputs}
                )
                return arrays

            where = first_difference(
                self.graph, edits, self.model, run, lambda: alone(self.model, [ids]), tolerance
            )
            if where is not None:
                return where
        return None


def _refused(case: Case, error: Exception) -> VerificationError:
    return VerificationError(
        f"verification failed: ONNX Runtime cannot run the graph: {case.name}",
        expected="logits",
        found=first_line(error),
        next_step=LOOK,
    )


def _decided(model: nn.Module, rows: Sequence[Sequence[int]], tolerance: float) -> list[int]:
    """Tokens of each row before the first that rounding may send to another expert."""
    counts = []
    for row in rows:
        with Routes(len(row), tolerance) as routes:
            alone(model, [row])
        counts.append(routes.decided)
    return counts


def _run(
    session: onnxruntime.InferenceSession, case: Case, rows: list[list[int]]
) -> Iterator[tuple[str, int, int, Tensor]]:
    """Yield (step name, row, first position, logits `[S, V]`) of the prefill and each step."""
    longest = max(case.lengths)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(case.lengths):
        ids[row, :length] = rows[row][:length]
        mask[row, :length] = 1
    past = empty_past(session, len(rows), case.buffer or 0)
    piece = case.chunks or longest
    for start in range(0, longest, piece):
        end = min(start + piece, longest)
        logits, past = step_of(session, ids[:, start:end], _wide(mask[:, :end], case), past)
        for row, length in enumerate(case.lengths):
            if logits.shape[1] == 1:  # of the last token only
                yield "prefill", row, min(length, end) - 1, logits[row]
            else:
                yield "prefill", row, start, logits[row, : length - start]
    for step in range(case.steps):
        ids = np.array(
            [[rows[row][length + step]] for row, length in enumerate(case.lengths)], dtype=np.int64
        )
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        logits, past = step_of(session, ids, _wide(mask, case), past)
        for row, length in enumerate(case.lengths):
            yield f"decode step {step + 1}", row, length + step, logits[row]


def _wide(mask: Any, case: Case) -> Any:
    """A mask of as many positions as the cache of a case has."""
    return np.pad(mask, ((0, 0), (0, max(0, (case.buffer or 0) - mask.shape[1]))))


def _compare_greedy(
    parity: Parity, session: onnxruntime.InferenceSession, model: nn.Module, prompt: list[int]
) -> None:
    """Generate greedily with the graph; each token must be the reference's best, or as good."""
    ids = np.array([prompt], dtype=np.int64)
    past, tokens = empty_past(session, 1), list(prompt)
    for _ in range(_GREEDY_TOKENS):
        mask = np.ones((1, len(tokens)), dtype=np.int64)
        logits, past = step_of(session, ids, mask, past)
        tokens.append(int(logits[0, -1].argmax()))
        ids = np.array([tokens[-1:]], dtype=np.int64)
    [reference] = alone(model, [tokens])
    scored = reference[len(prompt) - 1 : -1]
    chosen = scored.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
    best = scored.amax(1)
    [decided] = _decided(model, [tokens], parity.tolerance)
    tolerance = parity.tolerance if decided == len(tokens) else UNDECIDED
    parity.compare("greedy_tokens", f"{_GREEDY_TOKENS} tokens, greedily", chosen, best, tolerance)
