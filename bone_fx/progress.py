"""Progress: stage names and bytes on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import IO, Protocol, Self

PUBLISH = "publish"
"""The last stage: the folder is moved to the output."""

_WORTH_SHOWING = 20_000_000


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
    """A line a stage, and every quarter of its bytes; on a terminal the bytes stay on one line."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._start = time.monotonic()
        self._part = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._part >= 0 and self._terminal:
            self._write("\n")

    def stage(self, name: str) -> None:
        """A stage begins."""
        if self._part >= 0 and self._terminal:
            self._write("\n")
        self._part = -1
        bold, plain = ("\x1b[1m", "\x1b[0m") if self._terminal else ("", "")
        self._write(f"[{time.monotonic() - self._start:6.1f} s] {bold}{name}{plain}\n")

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage.

        Small models are written before it could be read.
        """
        if total < _WORTH_SHOWING:
            return
        steps = 100 if self._terminal else 4
        part = steps * done // max(total, 1)
        if part == self._part:
            return
        self._part = part
        text = f"           {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        self._write(f"\r{text}" if self._terminal else f"{text}\n")

    def _write(self, text: str) -> None:
        # A run does not fail because nobody reads how it goes.
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()
