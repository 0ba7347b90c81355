"""How every command of `bone-export` is set up, and the options that several have."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bone_fx.deploy.options import HELP

SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
HELP_FLAGS = {"help_option_names": ["-h", "--help"]}


def option(choice: str, *flags: str, **settings: Any) -> Any:
    """An option of one of `ExportOptions`' choices, with its sentence."""
    return typer.Option(*flags, help=HELP[choice], **settings)


Revision = Annotated[str | None, option("revision")]
AllowUnused = Annotated[list[str] | None, option("allow_unused", "--allow-unused", metavar="NAME")]
RemoteCode = Annotated[bool, option("trust_remote_code", "--trust-remote-code")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Write a report of a failure, with its traceback, to a file."),
]
