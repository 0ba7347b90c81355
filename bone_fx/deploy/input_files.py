"""The files that a run reads, and an output that would overwrite or delete one of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bone_fx.deploy.staging import refuse_inputs_as_output
from bone_fx.errors import UsageError

_LINKS = 40
"""Most links that lead from one to the next, as in the kernel."""


def refuse_overlap(
    output: str | Path,
    *,
    base: object,
    adapters: Sequence[str | Path] = (),
    texts: Iterable[str | Path | None] = (),
) -> None:
    """Refuse an output that is, holds or lies in anything that the run reads.

    A file is where its name stands, where each link that leads to it stands, and where it is.

    Args:
        output: The folder to publish.
        base: What the caller gave as the base; a module of the user's own has no files.
        adapters: Adapter folders.
        texts: Other files: calibration, samples.

    Raises:
        UsageError: It does; publishing would change an input.
    """
    given = [*adapters, *(text for text in texts if text is not None)]
    if isinstance(base, str | Path):
        given += [base, *_caches(Path(base).expanduser())]
    named = [path for each in given for path in _read(Path(each).expanduser())]
    paths = [path for path in named if os.path.lexists(path)]
    target = Path(output).expanduser()
    for place in (target, target.with_name(f"{target.name}.rejected")):
        refuse_inputs_as_output(place, paths)
        resolved = Path(os.path.realpath(place))
        for path in paths:
            link = next((step for step in _steps(path) if resolved in step.parents), None)
            if link is not None:
                raise UsageError(
                    f"the output {place} overlaps the input {path}, which is read through {link}",
                    expected="a folder apart from everything that is read",
                    next_step="choose another -o",
                )


def _read(path: Path) -> list[Path]:
    """A file, or a folder with what stands in it and in its subfolders."""
    if not os.path.isdir(path):
        return [path]
    return [path, *path.glob("*"), *path.glob("*/*")]


def _steps(path: Path) -> Iterator[Path]:
    """Where a name and each link that it leads to stand."""
    for _ in range(_LINKS):
        yield Path(os.path.realpath(path.parent)) / path.name
        if not os.path.islink(path):
            return
        path = path.parent / os.readlink(path)


def _caches(base: Path) -> list[Path]:
    """Where a base's files lie that is a hub id or holds a GGUF file."""
    from bone_fx.base.gguf import LAYOUT
    from bone_fx.base.hub import cache_folder
    from bone_fx.base.loading import cache_root

    if not os.path.lexists(base):
        return [cache_folder()]
    return sorted(cache_root().glob(f"{LAYOUT}-*"))
