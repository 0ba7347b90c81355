"""The memory that is available to this process, as Linux says it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """Where a version of control groups says how much a group may hold and holds.

    Attributes:
        folder: Of the root group.
        limit: Bytes that the group may hold.
        used: Bytes that it holds, the cache of files included.
        cached: Lines of `memory.stat` with bytes of files, which are given back when needed.
    """

    folder: str
    limit: str
    used: str
    cached: tuple[str, ...]


_VERSION_1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
_VERSION_2 = _Files(
    "sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file")
)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be used without swapping, within the limits of control groups.

    None where the system does not say.

    Args:
        root: The folder that holds `proc` and `sys`.
    """
    return min((*_of_system(root), *_of_groups(root)), default=None)


def _of_system(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.split()[0]) * 1024


def _of_groups(root: Path) -> Iterator[int]:
    """What is left in this process's group and in each one around it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        files = _VERSION_1 if controllers else _VERSION_2
        top = root / files.folder
        own = top / group.strip("/")
        for folder in (own, *own.parents):
            if folder.is_relative_to(top):
                yield from _left_in(folder, files)


def _left_in(folder: Path, files: _Files) -> Iterator[int]:
    limit, used = (_lines(folder / name) for name in (files.limit, files.used))
    if not limit or not used or not limit[0].isdigit():  # "max": no limit
        return
    stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat"))
    cached = sum(int(stat.get(name, 0)) for name in files.cached)
    yield max(0, int(limit[0]) - int(used[0]) + cached)


def _lines(path: Path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
