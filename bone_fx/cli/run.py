"""One command: from the arguments of the process to an exit status."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bone_fx.cli.signals import Signals

JSON, DEBUG = "--json", "--debug"
USAGE, INTERRUPTED = 2, 130


def run(arguments: Sequence[str], signals: Signals) -> int:
    """Run a command; returns the exit status, 0 exactly if it did what it was asked for.

    Every exception becomes a message on stderr, and an object on stdout with `--json`.
    """
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # transformers fetches and runs kernels from the hub by names in a configuration.
        if "--trust-remote-code" not in arguments:
            os.environ["USE_HUB_KERNELS"] = "0"
        from bone_fx.cli.commands import ABORT, WRONG_USAGE, split, start

        command, rest = split(arguments)
        try:
            status = start(command, rest, signals) or 0
        except WRONG_USAGE as error:
            program = f"bone-export {command}".rstrip()
            message = f"{error.format_message()}\n  next:     {program} --help"
            return _fail(message, USAGE, "UsageError", arguments)
        except ABORT as error:
            raise KeyboardInterrupt from error
        if status == INTERRUPTED:  # typer's answer to an interruption that it catches
            raise KeyboardInterrupt
        return status
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
