"""Verification of a decoder graph.

The reference runs every row alone, unpadded and without a cache, so that padding, masks, positions
and the cache of the graph are all on trial. Long texts are met on the first layers alone
(`verify.decoder.long_texts`).

Shape letters: B batch, S new tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError, first_line
from bone_fx.verify.cases import Case, decoder_cases, rows_of
from bone_fx.verify.compare_quantized import ROUNDED_ACTIVATIONS, Written
from bone_fx.verify.decoder.int8_cache import Int8Cache, rows_of_codes
from bone_fx.verify.decoder.long_texts import verify_long_texts
from bone_fx.verify.decoder.routes import Choices, Routes, joined
from bone_fx.verify.decoder.running import empty_past, logits_of, outputs_of, past_of, routed
from bone_fx.verify.decoder.samples import graph_likelihood, torch_likelihood
from bone_fx.verify.graph import Edit, WrittenGraph, keep_activations
from bone_fx.verify.locate import first_difference, located
from bone_fx.verify.parity import INT8_CACHE, SMALLEST, TOLERANCE, Parity, check_effect
from bone_fx.verify.ranges import LARGEST, within_range
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
    tolerance = TOLERANCE[checks.dtype]
    cache = Int8Cache.of(graph.path, tolerance)
    if cache is not None and graph.provider != "cpu":
        # CUDA's kernels read the keys of a prompt before they are rounded, the CPU's after that.
        tolerance, cache = INT8_CACHE, replace(cache, tolerance=INT8_CACHE)
    parity = Parity(tolerance, SMALLEST[checks.dtype])
    cases = decoder_cases(model.config, checks.context_length, short=checks.short)
    rows = [
        rows_of(case, checks.vocab_size, seed, checks.text if seed else ())
        for seed, case in enumerate(cases)
    ]
    costs = tolerance if cache is None else INT8_CACHE
    runs = _Runs(parity, cases, rows, graph, model, cache)
    actual = runs.run(()) if written is None else []
    # What quantization costs is measured against a model that chooses experts by itself.
    free: list[list[Routes]] = [[[] for _ in r] for r in rows]
    routes = [run.routes for run in actual] if written is None else free
    base = runs.expect(routes[:2], math.inf)[0] if adapters else []
    if checks.samples and adapters:
        parity.figures["nll_base"] = torch_likelihood(model, checks.samples)
    load_parameters(model, adapters)
    with unmerged(model, adapters), within_range(model, checks.dtype):
        reference, routes = runs.expect(routes, costs)
        rounded = runs.rounded(actual, routes, tolerance) if cache and actual else reference
        if checks.text and checks.dtype in LARGEST:
            torch_likelihood(model, (checks.text,))  # for its activations, the first token's too
        if checks.samples:
            name = "nll_adapter" if adapters else "nll_base"
            parity.figures[name] = torch_likelihood(model, checks.samples)
    fold_in_place(model, adapters)
    folded = runs.expect(routes, costs)[0] if adapters else reference
    for case, ones, others in zip(cases, folded, reference, strict=True):
        for row, (one, other) in enumerate(zip(ones, others, strict=True)):
            where = f"{case.name}, row {row}"
            parity.compare("unmerged_vs_folded", where, one, other, TOLERANCE["fp32"])
    references = {"onnx_vs_unmerged": rounded, "onnx_vs_folded": folded}
    edits: tuple[Edit, ...] = ()
    if written is None:
        if cache and adapters:
            references["onnx_vs_folded"] = runs.rounded(actual, routes, tolerance)
        elif cache:
            references["onnx_vs_folded"] = rounded
        runs.compare(actual, references, tolerance)
        if cache:
            runs.compare(actual, {"int8_cache": folded}, INT8_CACHE)
    else:
        written.load_into(model)
        rounds = graph.rounds_activations()
        edits = (keep_activations,) if rounds else ()
        actual = runs.run(edits)
        chosen = [run.routes for run in actual]
        quantized = (
            runs.rounded(actual, chosen, tolerance, edits)
            if cache
            else runs.expect(chosen, tolerance, edits)[0]
        )
        published = runs.run(()) if rounds else actual
        if rounds:
            # Rounded activations send tokens to other experts; their choice was tried unrounded.
            routes = [run.routes for run in published]
            led = runs.expect(routes, math.inf)[0] if any(map(any, routes)) else quantized
            runs.compare(published, {"rounded_activations": led}, ROUNDED_ACTIVATIONS)
        runs.compare(actual, {"onnx_vs_written": quantized}, tolerance, edits)
        if cache:
            # Coarse weights leave random tokens near where activations become massive, or do not:
            # as with rounded activations, the comparison above is the one that binds.
            floats = runs.expect(chosen, math.inf, edits)[0]
            runs.compare(actual, {"int8_cache": floats}, ROUNDED_ACTIVATIONS, edits)
        runs.compare(published, references, math.inf)
    if not checks.short:
        verify_long_texts(parity, graph, edits, model, checks.context_length, cache)
        _compare_greedy(parity, graph, edits, model, rows[0][0], cache)
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
class _Run:
    """What a graph made of a case.

    Attributes:
        steps: Step name, row, first position, and logits `[S, V]`.
        routes: The experts that it chose for each row.
        kept: What it kept of each row; None of a cache in floats.
    """

    steps: list[tuple[str, int, int, Tensor]]
    routes: list[Routes]
    kept: list[Int8Cache | None]


@dataclass(frozen=True)
class _Runs:
    """Cases, the token ids of their rows, and who runs them."""

    parity: Parity
    cases: Sequence[Case]
    rows: Sequence[list[list[int]]]
    graph: WrittenGraph
    model: nn.Module
    cache: Int8Cache | None

    def run(self, edits: Sequence[Edit]) -> list[_Run]:
        """Run the graph on every case; one that cannot be run has no steps."""
        choices = Choices.of(self.graph, edits)
        session = self.graph.session(*edits, *choices.edits)
        runs = []
        for case, rows in zip(self.cases, self.rows, strict=True):
            try:
                runs.append(_run(session, choices, case, rows, self.cache))
            except Exception as error:  # of ONNX Runtime, whose classes have no common one
                if case.buffer is None or self.graph.shares_a_buffer():
                    raise _refused(case, error) from error
                self.parity.skip(case.name, first_line(error))
                runs.append(_Run([], [[] for _ in rows], [None for _ in rows]))
        return runs

    def rounded(
        self,
        runs: Sequence[_Run],
        routes: Sequence[list[Routes]],
        tolerance: float,
        edits: Sequence[Edit] = (),
    ) -> list[list[Tensor]]:
        """The reference's logits `[S, V]` with what runs of the graph kept in its cache."""
        return self.expect(routes, tolerance, edits, [run.kept for run in runs])[0]

    def expect(
        self,
        routes: Sequence[list[Routes]],
        tolerance: float,
        edits: Sequence[Edit] = (),
        kept: Sequence[list[Int8Cache | None]] = (),
    ) -> tuple[list[list[Tensor]], list[list[Routes]]]:
        """The reference's logits `[S, V]` by case and row, and the experts that it took.

        Args:
            routes: The experts that it is given, of as many cases as are run.
            tolerance: How far its scores may be from those that choose them.
            edits: Edits of the graph that chose them.
            kept: What the graph kept of each row of each case; nothing for a cache in floats.
        """
        logits: list[list[Tensor]] = []
        made: list[list[Routes]] = []
        for number, given in enumerate(routes):
            case, rows = self.cases[number], self.rows[number]
            logits.append([])
            made.append([])
            for row, (ids, told) in enumerate(zip(rows, given, strict=True)):
                where = f"{case.name}, row {row}"
                codes = kept[number][row] if kept else None
                try:
                    values, chosen = routed(self.model, ids, told, tolerance, where, codes)
                except VerificationError as error:
                    raise located(error, self._where(edits, ids, tolerance)) from None
                logits[-1].append(values)
                made[-1].append(chosen)
        return logits, made

    def compare(
        self,
        runs: Sequence[_Run],
        references: Mapping[str, Sequence[Sequence[Tensor]]],
        tolerance: float,
        edits: Sequence[Edit] = (),
    ) -> None:
        """Compare a graph's logits with logits `[S, V]` by pair, case and row."""
        for number, (case, run) in enumerate(zip(self.cases, runs, strict=True)):
            for step, row, position, logits in run.steps:
                for pair, reference in references.items():
                    values = reference[number][row][position : position + len(logits)]
                    where = f"{case.name}: {step}, row {row}"
                    try:
                        self.parity.compare(pair, where, logits, values, tolerance)
                    except VerificationError as error:
                        ids = self.rows[number][row][: position + len(logits)]
                        raise located(error, self._where(edits, ids, tolerance)) from None
                    self.parity.compare_choices(pair, logits, values)

    def _where(self, edits: Sequence[Edit], ids: list[int], tolerance: float) -> str | None:
        """The first layer that differs on some tokens, all at once or the last after the others."""
        choices = Choices.of(self.graph, edits)
        for cached in (0, len(ids) - 1):
            routes: Routes = []
            kept: list[Int8Cache | None] = []

            def run(
                session: onnxruntime.InferenceSession,
                cached: int = cached,
                to: Routes = routes,
                into: list[Int8Cache | None] = kept,
            ) -> Sequence[Any]:
                past, outputs, pieces = empty_past(session, 1), {}, []
                for start, end in ((0, cached), (cached, len(ids))):
                    if start < end:
                        tokens = np.array([ids[start:end]], dtype=np.int64)
                        mask = np.ones((1, end), dtype=np.int64)
                        outputs = outputs_of(session, tokens, mask, past)
                        past = past_of(outputs)
                        pieces.append([c[0] for c in choices.read(outputs, tokens.shape)])
                to[:] = joined(pieces)
                into[:] = rows_of_codes(self.cache, past, [len(ids)])
                return list(outputs.values())

            def call(routes: Routes = routes, kept: list[Int8Cache | None] = kept) -> object:
                return routed(self.model, ids, routes, tolerance, kept=kept[0])

            where = first_difference(
                self.graph, (*edits, *choices.edits), self.model, run, call, tolerance
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


def _run(
    session: onnxruntime.InferenceSession,
    choices: Choices,
    case: Case,
    rows: list[list[int]],
    cache: Int8Cache | None,
) -> _Run:
    """The prefill and each step of a case."""
    longest = max(case.lengths)
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(case.lengths):
        ids[row, :length] = rows[row][:length]
        mask[row, :length] = 1
    past = empty_past(session, len(rows), case.buffer or 0)
    piece = case.chunks or longest
    steps: list[tuple[str, int, int, Tensor]] = []
    chosen: list[list[list[Tensor]]] = [[] for _ in rows]
    for start in range(0, longest, piece):
        end = min(start + piece, longest)
        outputs = outputs_of(session, ids[:, start:end], _wide(mask[:, :end], case), past)
        logits, past = logits_of(outputs), past_of(outputs)
        experts = choices.read(outputs, (len(rows), end - start))
        for row, length in enumerate(case.lengths):
            chosen[row].append([each[row, : max(0, length - start)] for each in experts])
            if logits.shape[1] == 1:  # of the last token only
                steps.append(("prefill", row, min(length, end) - 1, logits[row]))
            else:
                steps.append(("prefill", row, start, logits[row, : length - start]))
    for step in range(case.steps):
        ids = np.array(
            [[rows[row][length + step]] for row, length in enumerate(case.lengths)], dtype=np.int64
        )
        mask = np.concatenate([mask, np.ones((len(rows), 1), dtype=np.int64)], axis=1)
        outputs = outputs_of(session, ids, _wide(mask, case), past)
        logits, past = logits_of(outputs), past_of(outputs)
        experts = choices.read(outputs, ids.shape)
        for row, length in enumerate(case.lengths):
            chosen[row].append([each[row] for each in experts])
            steps.append((f"decode step {step + 1}", row, length + step, logits[row]))
    kept = rows_of_codes(cache, past, [length + case.steps for length in case.lengths])
    return _Run(steps, [joined(pieces) for pieces in chosen], kept)


def _wide(mask: Any, case: Case) -> Any:
    """A mask of as many positions as the cache of a case has."""
    return np.pad(mask, ((0, 0), (0, max(0, (case.buffer or 0) - mask.shape[1]))))


def _compare_greedy(
    parity: Parity,
    graph: WrittenGraph,
    edits: Sequence[Edit],
    model: nn.Module,
    prompt: list[int],
    cache: Int8Cache | None,
) -> None:
    """Generate greedily with the graph; each token must be the reference's best, or as good."""
    choices = Choices.of(graph, edits)
    session = graph.session(*edits, *choices.edits)
    ids = np.array([prompt], dtype=np.int64)
    past, tokens, chosen = empty_past(session, 1), list(prompt), []
    for _ in range(_GREEDY_TOKENS):
        outputs = outputs_of(session, ids, np.ones((1, len(tokens)), dtype=np.int64), past)
        past = past_of(outputs)
        chosen.append([each[0] for each in choices.read(outputs, ids.shape)])
        tokens.append(int(logits_of(outputs)[0, -1].argmax()))
        ids = np.array([tokens[-1:]], dtype=np.int64)
    case = f"{_GREEDY_TOKENS} tokens, greedily"
    [kept] = rows_of_codes(cache, past, [len(tokens) - 1])
    reference, _ = routed(model, tokens[:-1], joined(chosen), parity.tolerance, case, kept)
    scored = reference[len(prompt) - 1 :]
    generated = scored.gather(1, torch.tensor(tokens[len(prompt) :])[:, None])[:, 0]
    parity.compare("greedy_tokens", case, generated, scored.amax(1), parity.tolerance)
