"""Help of `bone-export`, laid out for terminals of 44 columns and more."""

from __future__ import annotations

import shutil
from typing import Any

from typer.core import TyperCommand, TyperGroup

_WIDEST, _NARROWEST = 80, 40
_NARROW = 64
"""Below so many columns what an option means stands under it, not beside it."""
_FIRST_COLUMN = {True: 2, False: 30}
"""Columns that the names of options take at most, in a narrow terminal and in others."""


def columns() -> int:
    """Columns of the terminal that help may fill."""
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size().columns)) - 2


class Command(TyperCommand):
    """A command whose options fit a narrow terminal."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options."""
        _write_parameters(self, ctx, formatter)


class Program(TyperGroup):
    """The program: what names no command is an export."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the commands, each with its first sentence, and the options."""
        rows = [(name, (self.commands[name].help or "").strip()) for name in self.commands]
        with formatter.section("Commands"):
            formatter.write_dl(rows)
        _write_parameters(self, ctx, formatter)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the arguments name, else the export: for the shell's completion."""
        name = args[0] if args[0] in self.commands else "export"
        return name, self.commands[name], args[1:] if name == args[0] else args


def parameters(command: Any, context: Any) -> dict[str, list[tuple[str, str]]]:
    """Names and sentences of a command's arguments and options, under their headings.

    Args:
        command: A command or the program.
        context: Click's context of it.
    """
    rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(context):
        names, text = parameter.get_help_record(context)
        if parameter.param_type_name == "argument":
            rows["Arguments"].append((parameter.metavar, text))
        else:
            rows["Options"].append((names, text))
    return rows


def _write_parameters(command: Any, context: Any, formatter: Any) -> None:
    first = _FIRST_COLUMN[formatter.width < _NARROW]
    for heading, rows in parameters(command, context).items():
        if rows:
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=first)
