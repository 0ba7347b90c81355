"""Every error a user can meet, and the exit status `bone-export` gives it.

An error is for the person at the keyboard: it names the layer or file, what was expected, what was
found and what to do next. Code raises the narrowest class; the command line turns it into one
message and `exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence

INTERNAL = 70
"""Exit status of a fault of our own (`EX_SOFTWARE` of sysexits.h)."""

KEPT = "<output>.rejected"
"""How a message of a failed verification names the folder in which the build is kept."""
LOOK = f"nothing was published; the build is kept as {KEPT}"
"""The next step where there is nothing to do but to look at the build."""


_INDENTED = "\n            "


class BoneFxError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: What is wrong, naming the layer, field or file.
        expected: What would have been right.
        found: What was there instead.
        next_step: What the person can do or type next.
    """

    exit_code = INTERNAL

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        found: object = None,
        next_step: str | None = None,
    ) -> None:
        self.what = what
        self.expected = expected
        self.found = found
        self.next_step = next_step
        parts = {"expected": expected, "found": found, "next": next_step}
        lines = [f"  {name + ':':9} {value}" for name, value in parts.items() if value is not None]
        # A line of a value stays below its name: a name from a file cannot pass for advice of ours.
        super().__init__("\n".join(line.replace("\n", _INDENTED) for line in [what, *lines]))


class UsageError(BoneFxError, ValueError):
    """A call or command line that cannot mean anything.

    What a person gave is also a `ValueError`, as PEFT raises one: here, and in what follows.
    """

    exit_code = 2


class InputRefusedError(BoneFxError, ValueError):
    """A base, an adapter or an example input that cannot be used."""

    exit_code = 3


class ConfigError(InputRefusedError):
    """A field of an adapter configuration with a value that is not allowed."""


class AdapterError(InputRefusedError):
    """An adapter folder that is broken or belongs to another model."""


class BaseModelError(InputRefusedError):
    """A base model that is missing, broken or of an unsupported kind."""


class SiteError(InputRefusedError):
    """A target that is no linear site, or a set of targets that does not fit the graph."""


class FoldError(BoneFxError, ValueError):
    """Folding gave a value that must not be published."""

    exit_code = 4


class ExportError(BoneFxError):
    """Capture, lowering, translation or writing failed."""

    exit_code = 5


class CaptureError(ExportError):
    """A model that cannot be captured, or whose capture would not be the model."""


class PassError(ExportError):
    """A graph pass broke its contract."""


class VerificationError(BoneFxError):
    """What was built does not agree with what was asked for; nothing was published."""

    exit_code = 6


class ProviderError(BoneFxError):
    """The execution provider that was asked for cannot be had here."""

    exit_code = 7


def printable(text: str, *, lines: bool = True) -> str:
    """Text that is safe on a terminal: what does not print is written as an escape.

    Control characters, colours, marks that turn the direction of writing, and parts of names that
    are not UTF-8.

    Args:
        text: The text, which may hold names from files.
        lines: Whether line feeds stay.
    """
    return "".join(
        c if c.isprintable() or (lines and c == "\n") else c.encode("unicode_escape").decode()
        for c in text
    )


def some(names: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (separator.join(names[:most]) or "none") + more


def first_line(error: BaseException) -> str:
    """Kind and first line of an error from elsewhere, to be quoted in one of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
