"""Progress of a command, which also tells the handlers of signals where the run is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import typer

from bone_fx.cli.signals import Signals
from bone_fx.progress import PUBLISH, Lines, Progress, Silent


class _Watched:
    def __init__(self, shown: Progress, signals: Signals) -> None:
        self._shown = shown
        self._signals = signals

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._signals.stage(publishes=name == PUBLISH)
        self._shown.stage(name)

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage."""
        self._signals.stage(publishes=False)
        self._shown.advance(done, total)


@contextmanager
def progress_of(context: typer.Context, *, quiet: bool) -> Iterator[Progress]:
    """What a run tells while it works.

    Args:
        context: Of the command; its object are the handlers of signals.
        quiet: Whether nothing is shown.
    """
    with nullcontext(Silent()) if quiet else Lines() as shown:
        yield _Watched(shown, context.obj)
