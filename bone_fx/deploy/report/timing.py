"""How long the stages of a run took."""

from __future__ import annotations

import time

from bone_fx.progress import Progress


class Timed:
    """Progress that notes when stages begin, and hands everything on."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown
        self._begun: list[tuple[str, float]] = []

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._begun.append((name, time.perf_counter()))
        self._shown.stage(name)

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage."""
        self._shown.advance(done, total)

    def stages(self) -> list[tuple[str, float]]:
        """Name and seconds of every stage up to now; the last one is going on."""
        ends = [start for _, start in self._begun[1:]] + [time.perf_counter()]
        return [(name, end - start) for (name, start), end in zip(self._begun, ends, strict=True)]
