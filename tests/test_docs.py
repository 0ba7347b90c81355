"""Examples in docstrings run, and README's Python is Python that names what there is."""

from __future__ import annotations

import ast
import doctest
import re
import runpy
import sys
from pathlib import Path

import pytest

import bone_fx

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
NAMES = ("README.md", "docs/training.md", "docs/peft.md")
DOCUMENTS = [Path(__file__).parents[1] / name for name in NAMES]


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


def blocks() -> list[tuple[str, str]]:
    """The Python blocks of the documents by document and number."""
    return [
        (f"{document.name}-{number}", block)
        for document in DOCUMENTS
        if document.exists()
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
        )
    ]


@pytest.mark.parametrize("block", [pytest.param(code, id=name) for name, code in blocks()])
def test_python_of_the_documents_names_what_there_is(block: str) -> None:
    for node in ast.walk(ast.parse(block)):
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
