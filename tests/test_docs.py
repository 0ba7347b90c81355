"""Examples in docstrings run, and code in the documents names what there is."""

from __future__ import annotations

import ast
import doctest
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

import bone_fx
from bone_fx.cli.commands import program, split
from tests.blocks import BLOCKS, ELSEWHERE, FRAGMENT, RUN, Block

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("name", sorted(set(bone_fx.__all__) - {"__version__"}))
def test_examples_of_a_public_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = getattr(bone_fx, name)
    monkeypatch.chdir("/")  # an example that wrote a file would say so here
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    module = sys.modules[value.__module__]
    for examples in doctest.DocTestFinder().find(value, name, module):
        runner.run(examples, out=report.append)
    assert not runner.failures, "".join(report)


def of_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_runs_or_says_that_it_is_a_fragment(block: Block) -> None:
    if block.language in ("", "text"):
        return  # a drawing, or what a program prints
    assert block.language in ("python", "bash")
    known = block.document in RUN or block.document in ELSEWHERE or block.is_fragment
    assert known, f"add the document to tests/blocks.py, or head the block with {FRAGMENT}"


@pytest.mark.parametrize("block", of_language("bash"), ids=lambda block: block.name)
def test_calls_in_the_documents_are_calls(block: Block) -> None:
    for line in re.sub(r"\\\n", "", block.code).splitlines():
        if line.startswith("bone-export "):
            words = shlex.split(line, comments=True)[1:]
            command, rest = split(words)
            command = command or "export"
            if rest != ["--help"]:
                program().commands[command].make_context(command, rest)


@pytest.mark.parametrize("block", of_language("python"), ids=lambda block: block.name)
def test_python_of_the_documents_names_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "bone_fx"
        ):
            assert hasattr(bone_fx, node.attr), node.attr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_without_arguments_says_its_usage(
    example: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(example), run_name="__main__")
    assert re.search(rf"^.*Run: .*examples/{example.name} \w+", str(end.value), re.MULTILINE)
