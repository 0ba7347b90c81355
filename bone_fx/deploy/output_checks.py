"""What a person names as the output, checked before any work is done."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bone_fx.deploy.earlier_output import MANIFEST, not_made_by_a_run, read_manifest
from bone_fx.errors import ExportError, UsageError, some
from bone_fx.files.inputs import place_of
from bone_fx.files.work_folder import NAME_OVERHEAD

_NAME_BYTES = 255
_ANOTHER = "choose another -o"
_MOUNTS = Path("/proc/self/mountinfo")
_LINKS = 40
"""Most links that lead from one to the next, as in the kernel."""


@dataclass(frozen=True)
class Output:
    """A folder to publish to.

    Attributes:
        path: Where it is, links followed.
        was_empty: Whether it is an empty folder now.
    """

    path: Path
    was_empty: bool


def check_output(
    output: str | Path,
    inputs: Iterable[str | Path],
    *,
    overwrite: bool,
    before: Callable[[Path], None] = lambda _: None,
) -> Output:
    """The folder to publish to.

    Args:
        output: What the person named.
        inputs: What the run reads.
        overwrite: Whether an earlier output may be replaced.
        before: Called with the folder once it is known to be no input, before what is there is
            looked at.

    Raises:
        UsageError: It is an input, exists without `overwrite`, or is no folder that a run may
            replace.
        ExportError: It cannot be looked at.
    """
    inputs = tuple(inputs)
    _refuse_name(output, inputs)
    try:
        target = Path(os.path.realpath(os.path.expanduser(output)))
        _refuse_place(output, target)
        _refuse_inputs(output, target, inputs)
        before(target)
        if not os.path.lexists(target):
            return Output(target, was_empty=False)
        _refuse_what_stands_there(output, target, overwrite=overwrite)
        was_empty = not os.listdir(target)
    except OSError as error:
        raise ExportError(
            f"the output {output} cannot be written", found=str(error), next_step=_ANOTHER
        ) from None
    if not was_empty:
        _refuse_foreign(output, target)
    return Output(target, was_empty)


def _refuse_name(output: str | Path, inputs: Iterable[str | Path]) -> None:
    for each in (output, *inputs):
        name = os.fspath(each)
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"the name {name!r} is not UTF-8, which libraries of an export need",
                next_step="rename it",
            ) from None
        if "\0" in name or not name:
            raise UsageError(f"{name!r} is no file name", next_step="give the path of a folder")


def _refuse_place(output: str | Path, target: Path) -> None:
    longest = _NAME_BYTES - NAME_OVERHEAD
    if len(os.fsencode(target.name)) > longest:
        raise UsageError(
            f"the name of the output {output} is too long",
            expected=f"at most {longest} bytes: folders beside it are named after it",
            found=f"{len(os.fsencode(target.name))} bytes",
            next_step=_ANOTHER,
        )
    here = Path.cwd()
    if target == here or target in here.parents:
        raise UsageError(
            f"the output {output} is or holds the folder that you are in",
            expected="a folder that can be replaced",
            next_step=_ANOTHER,
        )


def _refuse_inputs(output: str | Path, target: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is, holds or lies in one of the inputs: publishing would change it.

    An input is where its name stands, where each link that leads to it stands, and where it is. A
    folder that is mounted in two places is one folder.
    """
    place = cache(place_of)
    there, around = place(target), {place(parent) for parent in target.parents}
    for each in inputs:
        given = os.path.expanduser(each)
        steps = _steps(Path(given))
        link = next((step for step in steps if there in map(place, step.parents)), None)
        path = Path(os.path.realpath(given))
        overlaps = there in map(place, (path, *path.parents)) or (
            path.is_dir() and place(path) in around
        )
        if os.path.lexists(given) and (overlaps or link is not None):
            through = "" if overlaps or link is None else f", which is read through {link}"
            raise UsageError(
                f"the output {output} overlaps the input {each}{through}",
                expected="a folder apart from everything that is read",
                next_step=_ANOTHER,
            )


def _steps(path: Path) -> Iterator[Path]:
    """Where a name and each link that it leads to stand."""
    for _ in range(_LINKS):
        yield Path(os.path.realpath(path.parent)) / path.name
        if not os.path.islink(path):
            return
        path = path.parent / os.readlink(path)


def _refuse_what_stands_there(output: str | Path, target: Path, *, overwrite: bool) -> None:
    status = os.lstat(target)
    if not stat.S_ISDIR(status.st_mode):
        kind = "a file" if stat.S_ISREG(status.st_mode) else "no folder"
        raise UsageError(f"the output {output} is {kind}", expected="a folder", next_step=_ANOTHER)
    if not overwrite:
        raise UsageError(
            f"the output {output} exists", next_step=f"{_ANOTHER}, or pass --overwrite"
        )
    if target in _mount_points() or os.path.ismount(target):
        raise UsageError(
            f"the output {output} is a mount point, which cannot be replaced as a whole",
            expected="a folder inside it",
            next_step=f"-o {Path(output) / 'model'}",
        )
    parent = os.stat(target.parent)
    is_others = _user() not in (0, status.st_uid, parent.st_uid)
    if not os.access(target, os.W_OK) or (parent.st_mode & stat.S_ISVTX and is_others):
        raise ExportError(
            f"the output {output} cannot be written",
            found="no permission to replace it",
            next_step=_ANOTHER,
        )


def _refuse_foreign(output: str | Path, target: Path) -> None:
    if read_manifest(target) is None:
        raise UsageError(
            f"the output {output} is no earlier export: "
            f"it holds no {MANIFEST} that lists its files",
            expected="an empty folder or an earlier export",
            next_step=f"{_ANOTHER}; nothing was deleted",
        )
    if foreign := not_made_by_a_run(target):
        raise UsageError(
            f"the output {output} holds what no run made, and it would be deleted",
            expected="an earlier export as it was written",
            found=some(foreign),
            next_step=f"move it away, or {_ANOTHER}; nothing was deleted",
        )


def _user() -> int:
    """The user's number; 0, who may do everything, where there are none."""
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _mount_points() -> set[Path]:
    """Where file systems are mounted, folders of the same one among them; empty where unknown."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return set()
    # Field 5 is the place, with blanks and the like in octal (proc(5)).
    return {
        Path(os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1")))
        for line in lines
    }
