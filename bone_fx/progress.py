"""Progress: stages and a bar on a terminal, plain lines elsewhere, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import TracebackType
from typing import IO, TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

WORTH_SHOWING = 20_000_000
"""Bytes of a stage, or of a model's parameters, from which on they are shown."""
PUBLISH = "publish"
"""The last stage: the folder is moved to the output."""

_ON_A_TERMINAL, _ELSEWHERE = 100, 4
"""Parts of a stage that are shown."""


class Progress(Protocol):
    """What an export tells while it runs."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage."""


class Silent:
    """Says nothing."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage."""


class Lines:
    """A line a stage; of its bytes a bar on a terminal, and elsewhere a line every quarter.

    Args:
        stream: Where it is written, stderr by default.
    """

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._part = -1
        self._bar: Bar | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_of_stage()

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._end_of_stage()
        bold, plain = ("\x1b[1m", "\x1b[0m") if self._terminal else ("", "")
        self._write(f"[{time.monotonic() - self._start:6.1f} s] {bold}{name}{plain}\n")

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage.

        Small models are written before it could be read.
        """
        if total < WORTH_SHOWING:
            return
        part = (_ON_A_TERMINAL if self._terminal else _ELSEWHERE) * done // total
        if part == self._part:
            return
        self._part = part
        if not self._terminal:
            self._write(f"           {done / 1e6:,.0f} of {total / 1e6:,.0f} MB\n")
            return
        # A run does not fail because nobody reads how it goes.
        with suppress(OSError, ValueError):
            if self._bar is None:
                self._bar = _bar(self._stream, total)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=done, refresh=True)

    def _end_of_stage(self) -> None:
        with suppress(OSError, ValueError):
            if self._bar is not None:
                self._bar.stop()
        self._bar, self._part = None, -1

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def telling(progress: Progress | bool) -> Progress:
    """What a caller asked for: True tells on stderr, False nothing, and its own is its own."""
    if isinstance(progress, bool):
        return Lines() if progress else Silent()
    return progress


@contextmanager
def shown(progress: Progress | bool) -> Iterator[Progress]:
    """`telling`, with the bar off the terminal at the end."""
    told = telling(progress)
    with told if isinstance(told, Lines) else nullcontext():
        yield told


def _bar(stream: IO[str], total: int) -> Bar:
    """A bar with bytes and the time that is left, drawn only when it is told to."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    bar = Progress(
        BarColumn(bar_width=None),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=Console(file=stream, force_terminal=True),
        expand=True,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    bar.add_task("", total=total)
    return bar
