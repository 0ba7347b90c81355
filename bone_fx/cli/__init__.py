"""`bone-export`: its process, from the first moment to the exit status.

Importing this takes nothing but the standard library, so that a signal is answered from the start.
"""

from __future__ import annotations

import gc
import os
import sys

from bone_fx.cli.signals import Signals, Stopped


def program() -> None:
    """The process of `bone-export`: one command, and an exit that does not take graphs apart."""
    signals = Signals()
    signals.install()
    code = 0
    try:
        _open_standard_streams()
        from bone_fx.cli.terminal import quiet_libraries

        quiet_libraries()
        code = _run(signals)
    except Stopped as stop:  # while a message was written, or before there was anything to write
        code = stop.exit_code
    os._exit(code)


def main() -> None:
    """Run `bone-export` with the arguments of the process, and raise SystemExit."""
    signals = Signals()
    signals.install()
    try:
        code = _run(signals)
    finally:
        signals.restore()
    raise SystemExit(code)


def _run(signals: Signals) -> int:
    # The process lives for one command: collecting garbage among the graphs takes an eighth of it.
    gc.disable()
    from bone_fx.cli.run import run

    return run(sys.argv[1:], signals)


def _open_standard_streams() -> None:
    """Give a process that was started with a closed stream one that takes everything.

    Else the next file that is opened would be the stream, and what is printed would go into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
