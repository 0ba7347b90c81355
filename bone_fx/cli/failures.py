"""From an exception to what a person reads: what, where, what next, and an exit status."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from bone_fx.cli.signals import Stopped
from bone_fx.errors import INTERNAL, BoneFxError, ExportError, first_line

_OUT_OF_MEMORY = ("allocate memory", "not enough memory", "out of memory", "bad_alloc")
_PACKAGE = Path(__file__).resolve().parent.parent
_VERSIONS = (
    *("bone_fx", "torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime", "onnxscript"),
)


@dataclass(frozen=True)
class Failure:
    """What is said about an exception.

    Attributes:
        kind: Name of the error.
        message: What is wrong, where, and what to do next.
        exit_code: The exit status.
    """

    kind: str
    message: str
    exit_code: int


def failure_of(error: BaseException, *, debug: bool) -> Failure:
    """What is said about an exception that ended a run.

    Args:
        error: The exception.
        debug: Whether a report with all of it is written to a file, whatever its kind.
    """
    if isinstance(error, Stopped | KeyboardInterrupt):
        code = error.exit_code if isinstance(error, Stopped) else 130
        return Failure("Interrupted", "interrupted; nothing was published", code)
    known = _as_ours(error)
    if known is not None:
        message = str(known)
        if debug:
            message += f"\n  report:   {_write_report(error)}"
        return Failure(type(known).__name__, message, known.exit_code)
    place = _write_report(error)
    message = (
        f"a fault of bone_fx: {first_line(error)[:300]}\n"
        f"  where:    {_where(error)}\n"
        f"  report:   {place}\n"
        f"  next:     please send that file to the authors; nothing was published"
    )
    return Failure("InternalError", message, INTERNAL)


def _as_ours(error: BaseException) -> BoneFxError | None:
    """An error of ours, or one of the system's as ours; None for a fault."""
    if isinstance(error, BoneFxError):
        return error
    text = str(error).lower()
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY)
    ):
        return ExportError(
            "out of memory; nothing was published",
            next_step="close other programs; an export with --verify off loads no model",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return ExportError(
            f"{error.filename or 'a file'} cannot be read or written; nothing was published",
            found=error.strerror or first_line(error),
            next_step="check the file, its permissions and the space on its disk",
        )
    return None


def _where(error: BaseException) -> str:
    """The innermost line of this package that the exception came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)]
    if not ours:
        return "outside of bone_fx"
    path = Path(ours[-1].filename).relative_to(_PACKAGE.parent)
    return f"{path.as_posix()}, line {ours[-1].lineno}, in {ours[-1].name}"


def _write_report(error: BaseException) -> str:
    """Write traceback, command and versions to a file; its path, or why there is none."""
    lines = [
        f"command: {sys.argv!r}",
        f"python: {sys.version}",
        f"platform: {platform.platform()}",
        *_versions(),
        "",
        *traceback.format_exception(error),
    ]
    text = "\n".join(lines) + "\n"
    cache = Path(os.environ.get("BONE_FX_CACHE") or "~/.cache/bone_fx").expanduser()
    for folder in (None, cache):
        try:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            descriptor, path = tempfile.mkstemp(".txt", "bone-export-report-", folder)
            with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
        except OSError:
            continue
        return path
    return "none: neither the folder for temporary files nor the cache can be written"


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    lines = []
    for package in _VERSIONS:
        try:
            lines.append(f"{package}: {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package}: not installed")
    return lines
