"""What the doctor found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "problem"]
About = Literal["package", "provider", "place"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: `"problem"` keeps something from working, `"note"` is worth knowing.
        about: What kind of thing it is.
        what: What was found.
        next_step: What to type; None where there is nothing to do.
    """

    level: Level
    about: About
    what: str
    next_step: str | None = None

    def entry(self) -> dict[str, Any]:
        """The finding for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The finding for a terminal."""
        lines = [f"{self.level:8} {self.what}"]
        return [*lines, f"{'':8} next: {self.next_step}"] if self.next_step else lines
