"""A staging folder beside the output: what is built becomes visible whole, or not at all.

```
.OUT.staging-<random>/    marked and locked (files/work_folder.py); gone at the end
    bone_fx_run.json      the mark
    build/                what becomes OUT
    old/                  what was OUT, until it is deleted
    publishing            there while the two change places
```

A run deletes what it made and what an earlier run made (`earlier_output`), and nothing else: an
output with other files in it is refused before the work, and a folder that appears while the run
works is left as it is.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bone_fx.deploy.earlier_output import (
    BESIDE,
    MANIFEST,
    REJECTED,
    delete_output,
    files_of,
    not_made_by_a_run,
    read_manifest,
)
from bone_fx.deploy.output_checks import Output, check_output
from bone_fx.errors import KEPT, LOOK, ExportError, InputRefusedError, VerificationError, some
from bone_fx.files.inputs import place_of
from bone_fx.files.renames import exchange, rename_new
from bone_fx.files.work_folder import WorkFolder, dead_work_folders, make_work_folder

_PUBLISHING = "publishing"


@dataclass
class Staging:
    """A folder to build in.

    Attributes:
        output: Where it goes when it is published, as the person named it.
        overwrite: Whether an earlier output may be replaced.
        inputs: What the run reads: never replaced.
        published: Whether it is in its place.
    """

    output: Path
    overwrite: bool
    inputs: tuple[Path, ...]
    _target: Output
    _work: WorkFolder
    published: bool = field(default=False, init=False)

    @property
    def folder(self) -> Path:
        """Where to write."""
        return self._work.path / "build"

    @property
    def _old(self) -> Path:
        return self._work.path / "old"

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and move the folder into place.

        An earlier output goes only when the new one is there.

        Raises:
            ExportError: Something that no run made has appeared at the output; it is as it was.
        """
        self._write_manifest(manifest)
        (self._work.path / _PUBLISHING).touch()
        self._move_into_place()
        self.published = True
        if self._old.exists() and not delete_output(self._old):
            _keep(self._old, self._target.path)

    def reject(self, reason: str) -> Path | None:
        """Keep the folder beside the output, in place of one rejected before.

        Returns:
            Where it is; None if it could not be kept.
        """
        try:
            (self.folder / MANIFEST).unlink(missing_ok=True)
            content = {"format": 1, "kind": REJECTED, "verified": False, "error": reason}
            self._write_manifest({**content, "files": files_of(self.folder)})
            path = self._target.path
            for number in range(1, 100):
                name = f"{path.name}.rejected" + (f"-{number}" if number > 1 else "")
                place = path.with_name(name)
                if self._is_earlier_rejected(place):
                    delete_output(place)
                try:
                    rename_new(self.folder, place)
                except FileExistsError:
                    continue
                return place
        except OSError:
            return None
        return None

    def _write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest; files of the folder that it does not have are listed in it."""
        paths = (path for path in self.folder.rglob("*") if not path.is_dir())
        names = {path.relative_to(self.folder).as_posix() for path in paths}
        beside = sorted(names - {MANIFEST, *manifest["files"]})
        content = {**manifest, **({BESIDE: beside} if beside else {})}
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # A name that is not UTF-8 is written as JSON writes it.
        (self.folder / MANIFEST).write_bytes(text.encode("utf-8", "backslashreplace"))

    def _move_into_place(self) -> None:
        target = self._target.path
        if self._target.was_empty:
            try:
                os.rename(self.folder, target)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            else:
                return
        try:
            rename_new(self.folder, target)
        except FileExistsError:
            if not self.overwrite or read_manifest(target) is None:
                raise ExportError(
                    f"the output {self.output} appeared while the run worked",
                    next_step="choose another -o; it was left as it is, and nothing was published",
                ) from None
            self._refuse_foreign(target)
            self._replace(target)

    def _replace(self, target: Path) -> None:
        """Put the folder in the place of an earlier output, in one step if the system can."""
        in_one_step = exchange(self.folder, target)
        os.rename(self.folder if in_one_step else target, self._old)
        try:
            self._refuse_foreign(self._old)  # what came between the first look and the rename
            if not in_one_step:
                rename_new(self.folder, target)
        except BaseException:
            if in_one_step:
                exchange(self._old, target)
            else:
                rename_new(self._old, target)
            raise

    def _refuse_foreign(self, folder: Path) -> None:
        if foreign := not_made_by_a_run(folder):
            raise ExportError(
                f"files that no run made have appeared in the output {self.output}",
                found=some(foreign),
                next_step="move them away, or choose another -o; nothing was published",
            )

    def _is_earlier_rejected(self, place: Path) -> bool:
        there = place_of(place)
        if place.is_symlink() or any(there in map(place_of, (i, *i.parents)) for i in self.inputs):
            return False
        manifest = read_manifest(place)
        is_rejected = manifest is not None and manifest.get("kind") == REJECTED
        return is_rejected and not not_made_by_a_run(place)


@contextmanager
def staged(
    output: str | Path, *, overwrite: bool, inputs: Iterable[str | Path] = ()
) -> Iterator[Staging]:
    """A staging folder for `output`, gone at the end whatever happens.

    Published only by `Staging.publish`. What dead runs left of the same output is cleared first.

    A `VerificationError` keeps what was built as `<output>.rejected`.

    Args:
        output: The folder to publish.
        overwrite: Whether an earlier output may be replaced.
        inputs: What the run reads: the output must be apart from it.

    Raises:
        UsageError: The output exists and `overwrite` is False, or it is no folder that a run may
            replace.
        ExportError: It cannot be written to.
    """
    inputs = tuple(inputs)
    target = check_output(output, inputs, overwrite=overwrite, before=_clear_dead_runs)
    made: list[Path] = []
    with _errors_of_writing(output, target.path):
        work = None
        try:
            _make_parents(target.path.parent, made)
            work = make_work_folder(target.path.parent, target.path.name)
            real = tuple(Path(os.path.realpath(os.path.expanduser(each))) for each in inputs)
            given = Path(os.path.expanduser(output)).absolute()
            staging = Staging(given, overwrite, real, target, work)
            staging.folder.mkdir()
            try:
                yield staging
            except VerificationError as error:
                raise _saying_where(error, staging.reject(str(error))) from error
        finally:
            if work is not None:
                work.remove()
            for parent in reversed(made):
                _rmdir(parent)


def _clear_dead_runs(target: Path) -> None:
    """Remove what dead runs of this output left; an output that was on its way out goes back."""
    for dead in dead_work_folders(target.parent, target.name):
        old, build = dead.path / "old", dead.path / "build"
        if (dead.path / _PUBLISHING).exists():
            if old.exists() and not target.exists():
                rename_new(old, target)
            for folder in (old, build):
                if folder.exists() and not_made_by_a_run(folder):
                    _keep(folder, target)
        dead.remove()


def _keep(folder: Path, target: Path) -> None:
    """Move a folder that holds something no run made beside the output."""
    for number in range(1, 1000):
        try:
            rename_new(folder, target.with_name(f"{target.name}.kept-{number}"))
        except FileExistsError:
            continue
        return


def _saying_where(error: VerificationError, kept: Path | None) -> VerificationError:
    """The error, with the folder in which the build is kept."""
    step = "nothing was published, and the build could not be kept"
    if kept is not None:
        step = error.next_step or LOOK
        step = step.replace(KEPT, str(kept))
    return type(error)(error.what, expected=error.expected, found=error.found, next_step=step)


@contextmanager
def _errors_of_writing(output: str | Path, target: Path) -> Iterator[None]:
    """A full disk, a file too large, a folder without permission: as an error that says so."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # libraries' own
            raise
        reason = error.strerror or str(error)
        file = error.filename if isinstance(error.filename, str) else None
        ours = file is None or Path(file).is_relative_to(target.parent)
        if not ours and error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.EISDIR):
            raise InputRefusedError(
                f"{file} cannot be read",
                found=reason,
                next_step="check that it is there, and its permissions",
            ) from error
        raise ExportError(
            f"the output {output} cannot be written",
            found=reason + (f": {file}" if file else ""),
            next_step="free some space or choose another -o; nothing was published",
        ) from error


def _make_parents(parent: Path, made: list[Path]) -> None:
    """Make missing parents, and note them in a list, outermost first."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            continue
        made.append(path)


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return
