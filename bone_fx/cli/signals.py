"""Signals that end a run: it cleans up and exits with 128 + the signal's number.

A run that has begun to publish is not stopped any more: it ends in a moment, and its exit status
says what was published.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_PATIENCE = 10
"""Seconds in which a further signal does not disturb the cleaning up."""


class Stopped(BaseException):
    """A signal that ends the run.

    Attributes:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def exit_code(self) -> int:
        """What a shell reports for a program that the signal ended."""
        return 128 + self.number


class Signals:
    """The handlers of one run."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._is_publishing = False
        self._received: int | None = None
        self._at = 0.0

    def install(self) -> None:
        """Handle the signals that are not ignored, as `nohup` has SIGHUP ignored."""
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put the earlier handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stage(self, *, publishes: bool) -> None:
        """A stage of the run begins.

        Raises:
            Stopped: A signal came, and a library kept the exception to itself.
        """
        if self._received is not None:
            raise Stopped(self._received)
        self._is_publishing = publishes

    def cause_of(self, error: BaseException) -> BaseException:
        """The signal that came before an error, or the error.

        A library written in another language may turn `Stopped` into an error of its own.
        """
        return error if self._received is None else Stopped(self._received)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        is_cleaning = self._received is not None and time.monotonic() - self._at < _PATIENCE
        if self._is_publishing or is_cleaning:
            return
        self._received, self._at = number, time.monotonic()
        raise Stopped(number)
