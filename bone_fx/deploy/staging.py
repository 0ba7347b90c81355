"""A staging folder beside the output: what is built becomes visible whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bone_fx.errors import ExportError, UsageError, VerificationError

MANIFEST = "bone_export.json"
"""The file by which an earlier export is known."""


@dataclass
class Staging:
    """A folder to build in.

    Attributes:
        folder: Where to write.
        output: Where it goes when it is published.
    """

    folder: Path
    output: Path

    @property
    def rejected(self) -> Path:
        """Where a build that failed verification is kept."""
        return self.output.with_name(self.output.name + ".rejected")

    def publish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest and move the folder into place.

        An earlier output goes only when the new one is there.
        """
        content = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self.folder / MANIFEST).write_text(content, encoding="utf-8")
        old = self.output.with_name(f".{self.output.name}.old-{os.getpid()}")
        had_old = self.output.exists()
        if had_old:
            os.replace(self.output, old)
        try:
            os.replace(self.folder, self.output)
        except BaseException:
            if had_old:
                os.replace(old, self.output)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def reject(self) -> None:
        """Keep the folder beside the output, in place of one rejected before."""
        shutil.rmtree(self.rejected, ignore_errors=True)
        os.replace(self.folder, self.rejected)


@contextmanager
def staged(output: str | Path, *, overwrite: bool) -> Iterator[Staging]:
    """A staging folder for `output`, gone at the end whatever happens.

    Published only by `Staging.publish`.

    A `VerificationError` keeps what was built as `<output>.rejected`.

    Raises:
        UsageError: The output exists and `overwrite` is False, or it is a file.
        ExportError: The folder cannot be written to.
    """
    target = Path(output).expanduser().absolute()
    if target.exists() and not target.is_dir():
        raise UsageError(
            f"the output {output} is a file", expected="a folder", next_step="choose another -o"
        )
    if target.exists() and not overwrite:
        raise UsageError(
            f"the output {output} exists", next_step="choose another -o, or pass --overwrite"
        )
    if target.exists() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise UsageError(
            f"the output {output} is no earlier export: it holds no {MANIFEST}",
            expected="an empty folder or an earlier export",
            next_step="choose another -o; nothing was deleted",
        )
    try:
        parents = _make_parents(target.parent)
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.staging-"))
        folder.chmod(0o755)
        _check_replaceable(target)
    except OSError as error:
        raise ExportError(
            f"the output {output} cannot be written",
            found=str(error),
            next_step="choose another -o",
        ) from None
    staging = Staging(folder, target)
    try:
        yield staging
    except VerificationError:
        staging.reject()
        parents = []
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not target.exists():
            for parent in reversed(parents):
                if not any(parent.iterdir()):
                    parent.rmdir()


def refuse_inputs_as_output(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Refuse an output that is, holds or lies in one of the inputs.

    Raises:
        UsageError: It does; publishing would change an input.
    """
    target = Path(output).expanduser().resolve()
    for each in inputs:
        path = Path(each).expanduser()
        if not path.exists():
            continue
        path = path.resolve()
        if target == path or target in path.parents or path in target.parents:
            raise UsageError(
                f"the output {output} overlaps the input {each}",
                expected="a folder apart from the base and the adapters",
                next_step="choose another -o",
            )


def _make_parents(parent: Path) -> list[Path]:
    """Make missing parents; returns them, outermost first."""
    missing = [p for p in (parent, *parent.parents) if not p.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _check_replaceable(target: Path) -> None:
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(13, "Permission denied", str(target))
