"""The command `convert`: a Bone, BAT or MiSS adapter for tools that read another kind."""

from __future__ import annotations

from typing import Annotated

import typer

from bone_fx.cli.settings import AsJson, BaseOption, Debug, Output, Overwrite, RemoteCode, Revision
from bone_fx.cli.summary import convert_lines
from bone_fx.cli.terminal import answer, answer_json, note
from bone_fx.deploy.options import AdapterKind


def convert(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="Adapter in PEFT's layout: folder or hub id.")
    ],
    to: Annotated[AdapterKind, typer.Option("--to", help="Kind of the result.")],
    output: Output,
    base: BaseOption = None,
    approximate: Annotated[
        int | None,
        typer.Option(
            "--approximate", metavar="RANK", min=1, help="Round BAT to a LoRA of this rank."
        ),
    ] = None,
    overwrite: Overwrite = False,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a Bone, BAT or MiSS adapter as another kind, for tools that read that."""
    from bone_fx.deploy.conversion.convert_adapter import convert_adapter

    result = convert_adapter(
        adapter,
        to=to,
        output=output,
        base=base,
        approximate=approximate,
        overwrite=overwrite,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    for warning in result.warnings:
        note(warning)
    if as_json:
        answer_json(
            {
                "output": str(result.output),
                "peft_type": result.kind,
                "errors": dict(result.errors),
                "warnings": result.warnings,
            }
        )
    else:
        for line in convert_lines(result.output, result.kind, result.errors):
            answer(line)
