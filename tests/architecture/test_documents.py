"""What the documents name exists: files, folders, links, rooms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.architecture.sources import PACKAGE, ROOT, python_files, room_of

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = sorted(PACKAGE.rglob("README.md"))
README_LINES = 10
"""Lines of a room's README, at most."""

_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
_PATH = re.compile(r"(?<![\w/.-])((?:\.\.?/)*\w[\w./-]*(?:\.(?:py|sh|md|toml)|/))(?![\w/])")
"""A file of the kinds that are the repository's own, or a folder, which ends in a slash."""


def _missing(document: Path) -> list[str]:
    """Paths that a document names and that do not exist.

    A path is read from the document's folder, from the package, or from the checkout; in a room's
    README a bare name may also stand for a file deeper in that room.
    """
    roots = (document.parent, PACKAGE, ROOT)
    deeper = {path.name for path in document.parent.rglob("*.py")} if document in ROOMS else set()
    return [
        path
        for path in _PATH.findall(document.read_text(encoding="utf-8"))
        if path not in deeper and not any((root / path).exists() for root in roots)
    ]


def test_paths_are_recognised() -> None:
    text = "`bone_fx/cli.py`, `./tools/x.sh --all`, out/x, `model.onnx`, a.b(), and/or, ../lean/ or"
    assert _PATH.findall(text) == ["bone_fx/cli.py", "./tools/x.sh", "../lean/"]


@pytest.mark.parametrize("document", [*DOCUMENTS, *ROOMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_named_files_and_folders_exist(document: Path) -> None:
    assert not _missing(document)


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path) -> None:
    links = _LINK.findall(document.read_text(encoding="utf-8"))
    assert not [link for link in links if not (document.parent / link).exists()]


@pytest.mark.parametrize("readme", ROOMS, ids=lambda path: path.parent.name)
def test_room_readmes_are_short(readme: Path) -> None:
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_architecture_names_every_room() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `bone_fx/(\w+)(?:/|\.py)` \|", text, re.MULTILINE))
    assert named == {room_of(path) for path in python_files("bone_fx")}
