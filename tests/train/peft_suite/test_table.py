"""`TESTS.md` is held to the tests, and what differs in it to `docs/peft.md`."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parents[1]
ROW = re.compile(r"^\| `([\w:]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
ROWS = ROW.findall((HERE / "TESTS.md").read_text(encoding="utf-8"))
NAMED = {test for *_, cell in ROWS for test in re.findall(r"`([\w/]+\.py::\w+)`", cell)}


def functions_of(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


def test_every_test_of_pefts_has_one_row_with_an_answer() -> None:
    names = [name for name, *_ in ROWS]
    assert len(names) > 100
    assert len(set(names)) == len(names)
    for name, _, _, cell in ROWS:
        assert re.search(r"`[\w/]+\.py::\w+`|differs: ", cell), name


def test_every_test_that_is_named_is_there() -> None:
    for named in sorted(NAMED):
        file, _, test = named.partition("::")
        assert test in functions_of(TESTS / file), named


def test_every_test_of_this_folder_is_named() -> None:
    for file in HERE.glob("test_*.py"):
        if file.name != Path(__file__).name:
            place = file.relative_to(TESTS).as_posix()
            assert {f"{place}::{test}" for test in functions_of(file)} <= NAMED


def test_what_differs_has_its_reason_in_the_document() -> None:
    document = (TESTS.parent / "docs" / "peft.md").read_text(encoding="utf-8")
    section = document.split("## PEFT's own tests\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| ([^|]+?) \|$", section, re.MULTILINE)
    reasons = {name: reason for name, reason in rows if name != "what"}
    differing = {found for *_, cell in ROWS for found in re.findall(r"differs: ([^,|]+)", cell)}
    assert {name.strip() for name in differing} == reasons.keys()
    assert len(reasons) <= 10
    assert all(len(reason) > 20 for reason in reasons.values())
