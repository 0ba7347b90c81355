"""What a person reads: on stderr, and on stdout, where nothing of a file's is printed as it is.

A stream that is closed, full or a broken pipe does not change what a run did, nor its exit status.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import warnings
from typing import IO, Any

from bone_fx.errors import printable

_LINES, _CHARACTERS = 40, 6000
"""A message is cut after so many."""


def note(text: str) -> None:
    """A line on stderr."""
    _write(sys.stderr, f"note: {printable(text, lines=False)}\n")


def answer(text: str) -> None:
    """The result, a line on stdout."""
    _write(sys.stdout, f"{printable(text, lines=False)}\n")


def answer_part(text: str) -> None:
    """A part of the result on stdout, as it comes."""
    _write(sys.stdout, printable(text))


def answer_json(content: Any) -> None:
    """The result, or an error, as JSON on stdout."""
    _write(sys.stdout, json.dumps(content) + "\n")


def show_error(message: str) -> None:
    """An error on stderr."""
    red, plain = ("\x1b[31m", "\x1b[0m") if _is_terminal(sys.stderr) else ("", "")
    _write(sys.stderr, f"{red}error:{plain} {printable(message)}\n")


def cut(message: str) -> str:
    """A message that a person reads: dumps of graphs and the like are cut short."""
    lines = message[:_CHARACTERS].splitlines()
    if len(lines) <= _LINES and len(message) <= _CHARACTERS:
        return message
    return "\n".join([*lines[:_LINES], "  ... cut short; --debug writes all of it to a file"])


def quiet_libraries() -> None:
    """For a process of our own: no stray warning, traceback or name from a file on the screen."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_Printable())
    # An exception that nobody can catch, in a destructor or a thread of a library.
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """The record in a line; no traceback."""
        return printable(record.getMessage(), lines=False)


def _write(stream: IO[str] | None, text: str) -> None:
    if stream is None:
        return
    try:
        stream.write(text)
        stream.flush()
    except (OSError, ValueError):
        return


def _is_terminal(stream: IO[str] | None) -> bool:
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False
