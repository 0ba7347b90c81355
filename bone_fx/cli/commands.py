"""The program `bone-export`: its commands, and how arguments become one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, cast

import typer

from bone_fx import __version__
from bone_fx.cli.converting import convert
from bone_fx.cli.exporting import export, fold
from bone_fx.cli.generation import generate
from bone_fx.cli.layout import Command, Program, columns
from bone_fx.cli.mistakes import check_spelling, explain
from bone_fx.cli.settings import HELP_FLAGS
from bone_fx.cli.signals import Signals
from bone_fx.cli.terminal import answer
from bone_fx.cli.views import doctor, inspect, verify

# typer >= 0.29 carries its own click and exports of its errors only this subclass of the usage
# error.
_WRONG_USAGE = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
_INTERRUPTED = 130
"""What typer returns for a command that Ctrl-C ended, which it does not raise."""
_USAGE = 2
NAME = "bone-export"
COMPLETION = "_BONE_EXPORT_COMPLETE"
"""The variable by which a shell's completion asks the program."""

EPILOG = """\b
Examples:
  bone-export ./base -o ./out \\
    --adapter ./my-adapter
  bone-export model.gguf -o ./out
  bone-export generate ./out "Hello!"

A call that names no command is an export: bone-export BASE -o OUT.

Exit codes: 0 done, 2 usage, 3 input refused, 4 fold failed, 5 export failed, 6 verification
failed, 7 provider or onnxruntime-genai not to be had, 70 a fault of bone_fx, 129, 130, 143 ended by
SIGHUP, SIGINT, SIGTERM. Of an export or a fold nothing is published unless the code is 0.
"""

EXPORT_EPILOG = """\b
Examples:
  bone-export ./base -o ./out \\
    --adapter ./my-adapter
  bone-export ./base -o ./out \\
    --adapter poet=./run1/checkpoint-500 \\
    --adapter law=./run2/checkpoint-500
  bone-export owner/model -o ./out --json

Exit codes: bone-export --help. Nothing is published unless the code is 0.
"""

FOLD_EPILOG = """\b
Examples:
  bone-export fold ./base -o ./folded \\
    --adapter ./my-adapter
  bone-export fold ./base -o ./folded \\
    --adapter ./style --adapter ./facts

Exit codes: bone-export --help. Nothing is published unless the code is 0.
"""

VERIFY_EPILOG = """\b
Examples:
  bone-export verify ./out
  bone-export verify ./out --base ./base \\
    --adapter ./my-adapter

Without --base the files are hashed and the graph is run; with it, everything is compared again.
Nothing is written. Exit codes: bone-export --help.
"""

INSPECT_EPILOG = """\b
Examples:
  bone-export inspect ./my-adapter
  bone-export inspect ./my-adapter \\
    --base ./base --json

Exit code 0 if nothing would be refused, else the refusal's.
"""

CONVERT_EPILOG = """\b
Examples:
  bone-export convert ./my-adapter \\
    --to lora --base ./base -o ./my-lora
  bone-export convert ./my-adapter \\
    --to miss -o ./my-miss

A LoRA of a Bone or mini adapter is exact; BAT needs --approximate RANK. Exit codes: bone-export
--help.
"""

DOCTOR_EPILOG = """\
Exit code 0 if all is well, 7 if only the GPU's provider cannot be had, 5 for anything else.
"""

GENERATE_EPILOG = """\b
Examples:
  bone-export generate ./out "Hello!"
  bone-export generate ./out "Once upon" \\
    --plain --max-new-tokens 64

It needs the extra genai: pip install 'bone_fx[genai]'. Exit code 7 without it.
"""

COMMANDS: tuple[tuple[Callable[..., Any], str], ...] = (
    (export, EXPORT_EPILOG),
    (fold, FOLD_EPILOG),
    (verify, VERIFY_EPILOG),
    (inspect, INSPECT_EPILOG),
    (convert, CONVERT_EPILOG),
    (generate, GENERATE_EPILOG),
    (doctor, DOCTOR_EPILOG),
)
"""Every command and what its help ends with, in the order of the help."""


def _show_version(asked: bool) -> None:
    if asked:
        answer(f"{NAME} {__version__}")
        raise typer.Exit


def _program(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Fold adapters (Bone, BAT, MiSS, LoRA, DoRA) and export models to ONNX Runtime, verified."""


app = typer.Typer(
    cls=Program,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_FLAGS,
    epilog=EPILOG,
)
app.callback()(_program)
for _function, _epilog in COMMANDS:
    app.command(cls=Command, epilog=_epilog, context_settings=HELP_FLAGS)(_function)


@cache
def program() -> Program:
    """The program as click has it, built once."""
    return cast("Program", typer.main.get_command(app))


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the arguments name, "" for none, and the other arguments.

    The first argument that is no option, nor the value of one, is the command if it is one's name;
    a base of that name is `./fold`.
    """
    place = _first_word(arguments)
    if place is None or arguments[place] not in program().commands:
        return "", list(arguments)
    return arguments[place], [*arguments[:place], *arguments[place + 1 :]]


def start(arguments: Sequence[str], signals: Signals) -> int:
    """Run what the arguments say; returns the exit status of a command that ended well.

    Raises:
        UsageError: The arguments cannot mean anything.
        KeyboardInterrupt: The command was interrupted.
        BoneFxError: One of its kinds.
    """
    if COMPLETION in os.environ:
        return _ended_by_typer([], signals)
    command, rest = split(arguments)
    if not command:
        if not arguments or arguments[0] == "help":
            _call(["--help"], signals)
            return 0 if arguments else _USAGE
        place = _first_word(arguments)
        if place is None and (asked := _of_the_program(arguments)) is not None:
            return _ended_by_typer([asked], signals)
        if place is not None:
            check_spelling(arguments[place], tuple(program().commands))
        command = "export"
    try:
        status = _call([command, *rest], signals)
    except _WRONG_USAGE as error:
        raise explain(error, command, rest, program()) from None
    except typer.Abort:
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    return status


def _call(arguments: list[str], signals: Signals) -> int:
    status = program()(
        arguments,
        standalone_mode=False,
        prog_name=NAME,
        complete_var=COMPLETION,
        obj=signals,
        terminal_width=columns(),
    )
    return status or 0


def _ended_by_typer(arguments: list[str], signals: Signals) -> int:
    """The same for what typer answers by itself: a shell's completion ends with SystemExit."""
    try:
        return _call(arguments, signals)
    except SystemExit as end:
        return int(end.code or 0)


def _of_the_program(arguments: Sequence[str]) -> str | None:
    """An option among the arguments that is the program's own, as `--version` is."""
    own = {name for parameter in program().params for name in parameter.opts}
    return next(
        (each for each in arguments if each in own | {*HELP_FLAGS["help_option_names"]}), None
    )


def _first_word(arguments: Sequence[str]) -> int | None:
    """The place of the first argument that is no option, nor the value of one."""
    takes_value = _options_with_value()
    is_value = False
    for place, argument in enumerate(arguments):
        if is_value:
            is_value = False
        elif argument == "--":
            return None
        elif argument.startswith("--"):
            is_value = argument in takes_value
        elif argument.startswith("-") and argument != "-":
            first = next((c for c in argument[1:] if f"-{c}" in takes_value), None)
            is_value = first is not None and argument.index(first) == len(argument) - 1
        else:
            return place
    return None


@cache
def _options_with_value() -> frozenset[str]:
    """The options of all commands that the next argument belongs to."""
    return frozenset(
        option
        for each in program().commands.values()
        for parameter in each.params
        if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False)
        for option in parameter.opts
    )
