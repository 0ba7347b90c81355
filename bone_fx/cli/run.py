"""One command: from the arguments of the process to an exit status."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bone_fx.cli.signals import Signals

JSON, DEBUG = "--json", "--debug"


def run(arguments: Sequence[str], signals: Signals) -> int:
    """Run a command; returns the exit status, 0 exactly if it did what it was asked for.

    Every exception becomes a message on stderr, and an object on stdout with `--json`.
    """
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # transformers fetches and runs kernels from the hub by names in a configuration.
        if "--trust-remote-code" not in arguments:
            os.environ["USE_HUB_KERNELS"] = "0"
        from bone_fx.cli.commands import start

        return start(arguments, signals)
    except BaseException as error:  # noqa: BLE001 - the last place at which it can be explained
        from bone_fx.cli.failures import failure_of

        failure = failure_of(signals.cause_of(error), debug=DEBUG in arguments)
        return _fail(failure.message, failure.exit_code, failure.kind, arguments)


def _fail(message: str, code: int, kind: str, arguments: Sequence[str]) -> int:
    from bone_fx.cli.terminal import answer_json, cut, show_error

    message = cut(message)
    if JSON in arguments:
        answer_json({"error": kind, "exit_code": code, "message": message})
    show_error(message)
    return code
