"""The cases of a decoder, run by a graph and by the reference.

The reference takes the experts that the graph chose, and the cache that it kept in 8 bits, of one
row at a time; rows of about one length of other models in one batch.

Shape letters: B batch, S new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from bone_fx.errors import LOOK, VerificationError, first_line
from bone_fx.verify.cases import Case, original_contexts
from bone_fx.verify.decoder.quantized_cache import QuantizedCache, rows_of_codes
from bone_fx.verify.decoder.routes import Choices, Routes, joined
from bone_fx.verify.decoder.running import (
    Generation,
    empty_past,
    generate,
    logits_of,
    outputs_of,
    past_of,
    routed,
    together,
)
from bone_fx.verify.graph import Edit, WrittenGraph
from bone_fx.verify.locate import first_difference, located
from bone_fx.verify.parity import Parity

if TYPE_CHECKING:
    import onnxruntime

_BATCHED = 16
"""Tokens of the longest row that is run beside others."""


@dataclass(frozen=True)
class Run:
    """What a graph made of a case.

    Attributes:
        steps: Step name, row, first position, and logits `[S, V]`.
        routes: The experts that it chose for each row.
        kept: What it kept of each row; None of a cache in floats.
    """

    steps: list[tuple[str, int, int, Tensor]]
    routes: list[Routes]
    kept: list[QuantizedCache | None]


@dataclass(frozen=True)
class Runs:
    """Cases, the token ids of their rows, and who runs them.

    After the cases, the graph generates `greedy` tokens from the first row of the first case.
    """

    parity: Parity
    cases: Sequence[Case]
    rows: Sequence[list[list[int]]]
    graph: WrittenGraph
    model: nn.Module
    cache: QuantizedCache | None
    greedy: int

    def run(self, edits: Sequence[Edit]) -> tuple[list[Run], Generation | None]:
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
                runs.append(Run([], [[] for _ in rows], [None for _ in rows]))
        if not self.greedy:
            return runs, None
        return runs, generate(session, choices, self.rows[0][0], self.greedy, self.cache)

    def rounded(
        self,
        runs: Sequence[Run],
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
        kept: Sequence[list[QuantizedCache | None]] = (),
    ) -> tuple[list[list[Tensor]], list[list[Routes]]]:
        """The reference's logits `[S, V]` by case and row, and the experts that it took.

        Args:
            routes: The experts that it is given, of as many cases as are run.
            tolerance: How far its scores may be from those that choose them.
            edits: Edits of the graph that chose them.
            kept: What the graph kept of each row of each case; nothing for a cache in floats.
        """
        if not kept and not any(map(any, routes)):
            batched = self._without_experts(self.rows[: len(routes)])
            if batched is not None:
                return batched, [[[] for _ in case] for case in routes]
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

    def _without_experts(self, cases: Sequence[list[list[int]]]) -> list[list[Tensor]] | None:
        """The logits `[S, V]` of rows of cases, those of about one length in one batch.

        None of a model that chooses experts: what it is given is of one text.
        """
        rows = [row for case in cases for row in case]
        switches = original_contexts(self.model.config)
        batches: dict[object, list[int]] = {}
        for number, row in enumerate(rows):
            at_once = len(row) if len(row) > _BATCHED else 0
            key = (at_once, sum(switch < len(row) for switch in switches))
            batches.setdefault(key, []).append(number)
        logits: dict[int, Tensor] = {}
        for numbers in batches.values():
            values = together(self.model, [rows[number] for number in numbers])
            if values is None:
                return None
            logits.update(zip(numbers, values, strict=True))
        in_order = iter(range(len(rows)))
        return [[logits[next(in_order)] for _ in case] for case in cases]

    def compare(
        self,
        runs: Sequence[Run],
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
            kept: list[QuantizedCache | None] = []

            def run(
                session: onnxruntime.InferenceSession,
                cached: int = cached,
                to: Routes = routes,
                into: list[QuantizedCache | None] = kept,
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

            def call(routes: Routes = routes, kept: list[QuantizedCache | None] = kept) -> object:
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
    cache: QuantizedCache | None,
) -> Run:
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
    return Run(steps, [joined(pieces) for pieces in chosen], kept)


def _wide(mask: Any, case: Case) -> Any:
    """A mask of as many positions as the cache of a case has."""
    return np.pad(mask, ((0, 0), (0, max(0, (case.buffer or 0) - mask.shape[1]))))
