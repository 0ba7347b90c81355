"""What holds for the files themselves: length, places of tests, words that stand nowhere."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from tests.architecture.sources import PACKAGE, ROOT, project_files, python_files

LONGEST = 400
"""Lines of a file."""
MEDIAN = 120
"""Lines of half of the package's files, at most."""
FILES = 16
"""Python files in one folder of the package."""
# Each pattern is written so that it does not find itself.
UNWANTED = {
    "unfinished work": r"\bTO[D]O\b|\bFIX[M]E\b|\bX[X]X\b",
    "a path of one machine": r"(?<![\w.~])/(?:work|root|home|farm|opt)/\w",
    "a registry's address": r"py[p]i\.org|pythonh[o]sted\.org|index[-]url",
}
SILENCED = r"type: igno[r]e(?!\[)|# no[q]a(?!: [A-Z])"


def _tests_of(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [function.name for function in functions if function.name.startswith("test_")]


def _lines_with(pattern: str, paths: list[Path]) -> list[str]:
    found = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [
            f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
            for number, line in enumerate(text.splitlines(), 1)
            if re.search(pattern, line)
        ]
    return found


def test_files_hold_one_idea() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files("bone_fx", "tools")
    }
    assert not {name: length for name, length in lengths.items() if length > LONGEST}


def test_half_of_the_files_are_short() -> None:
    lengths = [len(p.read_text(encoding="utf-8").splitlines()) for p in python_files("bone_fx")]
    assert median(lengths) < MEDIAN


def test_folders_are_one_floor() -> None:
    counts = Counter(str(path.parent.relative_to(PACKAGE)) for path in python_files("bone_fx"))
    assert not {folder: n for folder, n in counts.items() if n > FILES}


@pytest.mark.parametrize("what", UNWANTED)
def test_no_file_holds(what: str) -> None:
    assert not _lines_with(UNWANTED[what], project_files())


def test_nothing_is_silenced_wholesale() -> None:
    assert not _lines_with(SILENCED, python_files("bone_fx", "tools", "tests", "examples"))


SAY_WHAT_IS_NEXT = ("AdapterError", "BaseModelError", "VerificationError")


def test_errors_about_what_a_person_gave_say_what_to_do_next() -> None:
    silent = [
        f"{path}:{node.lineno}"
        for path in python_files("bone_fx")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in SAY_WHAT_IS_NEXT
        and "next_step" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not silent


def test_every_test_is_collected() -> None:
    """Pytest reads test_*.py only; a test anywhere else would pass by never running."""
    lost = {
        str(path.relative_to(ROOT)): names
        for path in python_files("bone_fx", "tools", "tests", "examples")
        if not path.name.startswith("test_") and (names := _tests_of(path))
    }
    assert not lost


def test_no_test_hides_another() -> None:
    """Of two functions with one name in a file only the last is collected."""
    hidden = {}
    for path in python_files("tests"):
        names = _tests_of(path)
        hidden[str(path.relative_to(ROOT))] = sorted({n for n in names if names.count(n) > 1})
    assert not any(hidden.values()), hidden


@pytest.mark.parametrize("folder", ["bone_fx", "tests"])
def test_every_folder_is_a_package(folder: str) -> None:
    """Without it two test files of one name collide, and a room is left out of the wheel."""
    folders = {path.parent for path in python_files(folder)}
    assert not {str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").exists()}


def test_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
