"""Code blocks of the documents, and what each of them is: run, or a fragment that says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SEQUENCES = (
    ("README.md",),
    ("docs/quickstart.md", "docs/outputs.md"),
    ("docs/deployment.md",),
)
"""Documents whose blocks run one after another in one folder, by
`tests/end_to_end/test_documents.py`."""
RUN = {name for sequence in SEQUENCES for name in sequence}
ELSEWHERE = {
    "docs/cli.md": "generated, and its calls are parsed by tests/cli/test_reference.py",
    "docs/gpu.md": "commands for a machine with a card",
}
FRAGMENT = 'title="fragment"'
_BLOCK = re.compile(r"^```(\S*)[ ]*([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        document: Path from the checkout.
        number: Counted from 0 in its document.
        language: What stands behind the fence; empty for drawings.
        is_fragment: Whether it says that it is one.
        code: The lines.
    """

    document: str
    number: int
    language: str
    is_fragment: bool
    code: str

    @property
    def name(self) -> str:
        """Document and number."""
        return f"{self.document}-{self.number}"


def blocks(document: Path) -> list[Block]:
    """The blocks of a document, in order."""
    name = document.relative_to(ROOT).as_posix()
    found = _BLOCK.findall(document.read_text(encoding="utf-8"))
    return [
        Block(name, number, language, FRAGMENT in title, code)
        for number, (language, title, code) in enumerate(found)
    ]


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
