"""The contract of a pass, and the frame that catches an author who breaks it.

A pass is a function that edits the graph it is given, in place, and says what it did: an `Outcome`.
Passes stand in tables, a `Row` each. The frame checks what a row requires, runs the pass, checks
that `modified` is true, lints what changed, and names the pass and those before it in any error.
A public verb is a pass that `on_a_copy` gives a copy of its input.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Concatenate, ParamSpec

from torch import fx

from bone_fx.errors import BoneFxError, PassError, first_line
from bone_fx.graphs import copy_module
from bone_fx.sites import LinearSite, Refusal

log = logging.getLogger(__name__)
HISTORY = "bone_fx_passes"
"""Key of `GraphModule.meta` with the names of the passes that ran, in order."""

P = ParamSpec("P")
Requirement = Callable[[fx.Graph], "fx.Node | None"]
"""The first node that breaks a requirement, or None; its name says what is required."""

_State = tuple[fx.Node, str, Any, Any, Any]


class Keeps(Enum):
    """What a pass leaves as it was in the values that a graph computes."""

    BITS = "every bit"
    LAST_BIT = "all but rounding: the same products and sums in another kernel or order"
    MATHEMATICS = "the mathematics: the same function, written in another way"


@dataclass(frozen=True)
class Outcome:
    """What a pass did to the graph that it was given.

    Attributes:
        modified: True only if something changed.
        applied: The sites that the pass changed, in graph order.
        refused: What was asked for and not done, each with its reason.
    """

    modified: bool
    applied: tuple[LinearSite, ...] = ()
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class PassResult:
    """What a public verb gives back.

    Attributes:
        graph_module: The graph after the pass; the verb's input is left as it was.
        modified: True only if something changed.
        applied: The sites that the pass changed, in graph order.
        refused: What was asked for and not done, each with its reason.
    """

    graph_module: fx.GraphModule
    modified: bool
    applied: tuple[LinearSite, ...] = ()
    refused: tuple[Refusal, ...] = field(default=())


@dataclass(frozen=True)
class Row:
    """A pass in its table.

    Attributes:
        run: The pass.
        keeps: What it leaves as it was.
        place: Why it stands where it stands; empty where it could stand elsewhere.
        requires: What must hold of the graph. Where it does not, the pass is left out, and a
            refusal says so.
    """

    run: Callable[[fx.Graph], Outcome]
    keeps: Keeps
    place: str = ""
    requires: tuple[Requirement, ...] = ()


class Frame:
    """Runs passes on one graph, one after another, and holds each to its contract.

    Attributes:
        history: Names of the passes that ran, in order.

    Args:
        subject: What the passes are given: the graph, or the module that has it.
        sweep: Whether to erase dead code before and after each pass.
        lint: Whether to lint after each pass that changed something; else the caller does at the
            end.
    """

    def __init__(
        self, subject: fx.Graph | fx.GraphModule, *, sweep: bool = False, lint: bool = True
    ) -> None:
        self._subject, self._sweep, self._lint = subject, sweep, lint
        self._graph = subject if isinstance(subject, fx.Graph) else subject.graph
        module = self._graph.owning_module
        self._meta: dict[str, Any] = {} if module is None else module.meta
        self.history: list[str] = [*self._meta.get(HISTORY, [])]

    def run_table(self, rows: Iterable[Row]) -> Outcome:
        """Run a table from top to bottom."""
        outcomes = [self.run_row(row) for row in rows]
        return Outcome(
            any(outcome.modified for outcome in outcomes),
            tuple(site for outcome in outcomes for site in outcome.applied),
            tuple(refusal for outcome in outcomes for refusal in outcome.refused),
        )

    def run_row(self, row: Row) -> Outcome:
        """Run a pass of a table, unless one of its requirements does not hold."""
        for requirement in row.requires:
            node = requirement(self._graph)
            if node is not None:
                needed = f"it needs {requirement.__name__}, and {node.name} is {node.target}"
                refusal = Refusal(row.run.__name__, f"{needed}; {self._before()}")
                log.debug("pass left out: %s", refusal)
                return Outcome(modified=False, refused=(refusal,))
        return self.run(row.run)

    def run(
        self, run: Callable[Concatenate[Any, P], Outcome], *args: P.args, **kwargs: P.kwargs
    ) -> Outcome:
        """Run a pass.

        Raises:
            PassError: It failed, left an invalid graph, or was wrong about `modified`.
        """
        name, graph = run.__name__, self._graph
        if self._sweep:
            graph.eliminate_dead_code()
        before = _states(graph)
        try:
            outcome = run(self._subject, *args, **kwargs)
            if self._sweep and outcome.modified:
                graph.eliminate_dead_code()
            if self._lint and outcome.modified:
                graph.lint()
        except PassError as error:
            raise PassError(f"pass {name} failed: {error.what}", found=self._before()) from error
        except BoneFxError:
            raise  # about what was asked for
        except Exception as error:
            raise PassError(
                f"pass {name} failed: {first_line(error)}", found=self._before()
            ) from error
        after = _states(graph)
        if outcome.modified != (after != before):
            raise PassError(
                f"pass {name} answered modified={outcome.modified}, which is not so",
                found=self._before(),
            )
        self.history.append(name)
        self._meta[HISTORY] = [*self.history]
        if log.isEnabledFor(logging.DEBUG):
            log.debug("pass %s: %s", name, op_difference(before, after))
        return outcome

    def _before(self) -> str:
        return f"passes before it: {', '.join(self.history) or 'none'}"


def on_a_copy(
    run: Callable[Concatenate[fx.GraphModule, P], Outcome],
) -> Callable[Concatenate[fx.GraphModule, P], PassResult]:
    """The public verb of a pass: it works on a compiled copy and leaves its input as it was."""

    @functools.wraps(run)
    def verb(gm: fx.GraphModule, /, *args: P.args, **kwargs: P.kwargs) -> PassResult:
        copied = copy_module(gm)
        outcome = Frame(copied).run(run, *args, **kwargs)
        copied.recompile()
        return PassResult(copied, outcome.modified, outcome.applied, outcome.refused)

    return verb


def op_difference(before: Sequence[_State], after: Sequence[_State]) -> str:
    """How many nodes of each target came and went, such as `+14 bone_fx.adapted_linear.default`."""
    counts = Counter(str(target) for _, op, target, *_ in after if op.startswith("call"))
    counts.subtract(str(target) for _, op, target, *_ in before if op.startswith("call"))
    return (
        " ".join(f"{number:+d} {target}" for target, number in sorted(counts.items()) if number)
        or "no difference"
    )


def _states(graph: fx.Graph) -> list[_State]:
    """All that a pass can change in nodes; arguments are not copied, as they never change."""
    return [(n, n.op, n.target, n.args, n.kwargs) for n in graph.nodes]
