"""The commands that look and write nothing: `inspect` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bone_fx.cli.settings import (
    HELP_FLAGS,
    SETTINGS,
    AllowUnused,
    AsJson,
    Debug,
    Quiet,
    RemoteCode,
    Revision,
)
from bone_fx.cli.terminal import answer, answer_json, note

INSPECT_EPILOG = """\b
Examples:
  bone-export inspect ./my-adapter
  bone-export inspect ./my-adapter --base ./base --json

Exit code 0 if nothing would be refused, else the refusal's.
"""

DOCTOR_EPILOG = """\b
Exit code 0 if all is well, 7 if only the GPU's provider cannot be had, 5 for anything else.
"""

inspect_app = typer.Typer(**SETTINGS)
doctor_app = typer.Typer(**SETTINGS)


@inspect_app.command(epilog=INSPECT_EPILOG, context_settings=HELP_FLAGS)
def bone_export_inspect(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Adapter in PEFT's layout.")],
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="A base to match it with: folder, GGUF, id."),
    ] = None,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Show what an adapter is, what would be refused, and how it fits a base."""
    from bone_fx.deploy.inspection import as_lines, inspect_adapter

    view = inspect_adapter(
        adapter,
        base=base,
        trust_remote_code=trust_remote_code,
        revision=revision,
        allow_unused=allow_unused or (),
    )
    for text in view["notes"]:
        note(text)
    if as_json:
        answer_json(view)
    else:
        for line in as_lines(view):
            answer(line)
    return int(view["refused"][0]["exit_code"]) if view["refused"] else 0


@doctor_app.command(epilog=DOCTOR_EPILOG, context_settings=HELP_FLAGS)
def bone_export_doctor(
    as_json: AsJson = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only what is wrong or worth knowing.")
    ] = False,
    debug: Debug = False,
) -> int:
    """Say what is wrong with this environment, and what to type."""
    from bone_fx.deploy.doctor import examine, exit_code

    findings = examine()
    if as_json:
        answer_json({"findings": [finding.entry() for finding in findings]})
    else:
        for finding in findings:
            if quiet and finding.level == "ok":
                continue
            for line in finding.lines():
                answer(line)
    return exit_code(findings)


VIEWS = {"inspect": inspect_app, "doctor": doctor_app}
"""The commands by name."""
