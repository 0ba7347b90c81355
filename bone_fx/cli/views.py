"""The commands that look and write nothing: `verify`, `inspect` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bone_fx.cli.adapters import named_adapters, named_variants
from bone_fx.cli.settings import (
    ADAPTER,
    AllowUnused,
    AsJson,
    BaseOption,
    Debug,
    Quiet,
    RemoteCode,
    Revision,
    Samples,
)
from bone_fx.cli.summary import verify_lines
from bone_fx.cli.terminal import answer, answer_json, note
from bone_fx.cli.watching import progress_of
from bone_fx.deploy.options import Compared, Provider

VARIANT = typer.Option(
    "--variant",
    metavar="NAME=DIR",
    help="Of a folder of variants: the adapter that one was made from; repeat for each.",
)


def verify(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Output of an export or a fold.")],
    base: BaseOption = None,
    adapter: Annotated[list[str] | None, ADAPTER] = None,
    variant: Annotated[list[str] | None, VARIANT] = None,
    provider: Annotated[Provider, typer.Option(help="Provider to run the graph on.")] = "cpu",
    verify: Annotated[Compared, typer.Option(help="How much is compared with torch.")] = "full",
    samples: Samples = None,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify an output again, from its files and its manifest."""
    adapters, variants = named_adapters(adapter or []), named_variants(variant or [])
    from bone_fx.deploy.verify_export import verify_export

    with progress_of(context, quiet=quiet) as progress:
        result = verify_export(
            output,
            base=base,
            adapters=adapters,
            variants=variants,
            provider=provider,
            verify=verify,
            samples=samples,
            revision=revision,
            allow_unused=allow_unused,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    for warning in result.warnings:
        note(warning)
    if as_json:
        found = {"files": result.files, "verification": result.verification}
        answer_json({"output": str(result.output), "warnings": result.warnings, **found})
    else:
        for line in verify_lines(result.output, result.files, result.verification):
            answer(line)


def inspect(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter in PEFT's layout: folder or hub id.")
    ],
    base: BaseOption = None,
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


def doctor(
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
