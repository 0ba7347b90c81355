"""Writes docs/cli.md, the reference of the command line, from the commands themselves.

Run: python tools/cli_reference.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bone_fx.cli.commands import NAME, program
from bone_fx.cli.layout import parameters

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
_HEAD = f"""\
# Command line

`{NAME}` is one program with commands. A call that names none is an export: `{NAME} BASE -o OUT`.
[errors.md](errors.md) says what its exit codes mean, [export.md](export.md) what an export does.

This page is written by `python tools/cli_reference.py`.
"""
_EXAMPLES = re.compile(r"\x08\nExamples:\n((?:  .*\n)+)")


def reference() -> str:
    """The page."""
    with program().make_context(NAME, [], resilient_parsing=True) as context:
        commands = program().commands
        listed = [f"| [`{name}`](#{name}) | {each.help} |" for name, each in commands.items()]
        parts = [
            _HEAD,
            "\n".join(["| command | what it does |", "|---|---|", *listed]) + "\n",
            _section(NAME, f"{NAME} [OPTIONS] COMMAND", program(), context),
        ]
        for name, command in commands.items():
            with command.make_context(
                name, [], parent=context, resilient_parsing=True
            ) as its_context:
                words = [name for name, _ in parameters(command, its_context)["Arguments"]]
                usage = " ".join([NAME, name, "[OPTIONS]", *words])
                parts.append(_section(name, usage, command, its_context))
    return "\n".join(parts)


def _section(title: str, usage: str, command: Any, context: Any) -> str:
    """One command: what it does, usage, arguments and options, examples and what else it says."""
    table = [
        f"| `{_cell(name)}` | {_cell(text)} |"
        for rows in parameters(command, context).values()
        for name, text in rows
    ]
    epilog = command.epilog or ""
    examples = "".join(_EXAMPLES.findall(epilog))
    rest = _EXAMPLES.sub("", epilog).strip()
    return "\n".join(
        [
            f"## {title}\n",
            f"{command.help}\n",
            f"```text\n{usage}\n```\n",
            "| argument or option | meaning |",
            "|---|---|",
            *table,
            "",
            *(["```bash", *(line[2:] for line in examples.splitlines()), "```\n"] * bool(examples)),
            f"{rest}\n",
        ]
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
