"""The command line in this process, without the seconds that a process needs to import PyTorch."""

from __future__ import annotations

import contextlib
import gc
import io
import sys
from subprocess import CompletedProcess

import pytest

from bone_fx.cli import main


def run(*arguments: object) -> CompletedProcess[str]:
    """Run `bone-export` with these arguments: its exit status and what it printed."""
    command = ["bone-export", *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    collects = gc.isenabled()
    status = None
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", command)
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        finally:
            if collects:  # main() turns it off: its process ends with the command
                gc.enable()
    assert status is not None, "main() raises SystemExit"
    return CompletedProcess(command, status, out.getvalue(), err.getvalue())
