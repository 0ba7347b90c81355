"""How every command of `bone-export` is set up, and the options that several have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bone_fx.deploy.options import HELP

HELP_FLAGS = {"help_option_names": ["-h", "--help"]}


def option(choice: str, *flags: str, **settings: Any) -> Any:
    """An option of one of `ExportOptions`' choices, with its sentence."""
    return typer.Option(*flags, help=HELP[choice], **settings)


ADAPTER = typer.Option(
    "--adapter",
    metavar="[NAME=]DIR",
    help="Bone, BAT, MiSS, LoRA or DoRA adapter in PEFT's layout: a folder, or a hub id "
    "(ID@REVISION); repeat to apply several, in order.",
)
Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Hugging Face folder, GGUF file or hub id.")
]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="BASE", help="The base: folder, GGUF file or hub id."),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to publish.")]
Overwrite = Annotated[bool, option("overwrite", "--overwrite")]
Samples = Annotated[str | None, option("samples", metavar="FILE")]
Revision = Annotated[str | None, option("revision", metavar="REVISION")]
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
