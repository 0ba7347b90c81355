"""docs/cli.md and docs/errors.md say what the program does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bone_fx import errors
from bone_fx.cli import mistakes
from bone_fx.cli.commands import program, split, start
from bone_fx.cli.signals import Signals

ROOT = Path(__file__).parents[2]
ERRORS = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KINDS = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.BoneFxError)
]


def test_the_reference_is_that_of_the_commands() -> None:
    code = "import sys, tools.cli_reference as page; sys.stdout.write(page.reference())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == done.stdout, "run python tools/cli_reference.py"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_exception_stands_in_the_table_of_its_code(kind: type[errors.BoneFxError]) -> None:
    if kind is errors.BoneFxError:
        assert "bone_fx.BoneFxError" in ERRORS
        return
    own_code = kind.__mro__[1] is errors.BoneFxError
    row = rf"^\| {kind.exit_code} \| `{kind.__name__}` \|" if own_code else ""
    parents = [f"`{base.__name__}`" for base in kind.__bases__]
    row = row or rf"^\| `{kind.__name__}` \| {', '.join(parents)} \|"
    assert re.search(row, ERRORS, re.MULTILINE)


def test_calls_in_examples_and_advice_are_calls() -> None:
    """What the help and the answers tell people to type is taken by the parser."""
    epilogs = [each.epilog or "" for each in (program(), *program().commands.values())]
    calls = [line for text in epilogs for line in re.sub(r"\\\n", "", text).splitlines()]
    calls = [
        line.split("bone-export ", 1)[1] for line in calls if line.startswith("  bone-export ")
    ]
    assert len(calls) > 10
    for call in [*calls, *(each.split(" ", 1)[1] for each in mistakes._CALLS.values())]:
        command, rest = split(re.sub(r'"[^"]*"', "PROMPT", call).split())
        command = command or "export"
        program().commands[command].make_context(command, rest)


def test_other_words_are_no_words_of_ours() -> None:
    own = {name for each in program().commands.values() for p in each.params for name in p.opts}
    other = {word for words in mistakes._OTHER_FLAGS.values() for word in words}
    assert not own & other
    assert {flag.split()[0] for flag in mistakes._OTHER_FLAGS} <= own | {"--version"}
    commands = {word for words in mistakes._OTHER_COMMANDS.values() for word in words}
    assert not commands & set(program().commands)
    for word in commands:
        with pytest.raises(errors.UsageError, match=f"no command {word}"):
            start([word, "-o", "out"], Signals())
