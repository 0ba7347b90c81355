"""Reads the tree that the architecture tests look at: its files, and what each file imports."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "bone_fx"


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders of the checkout."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def project_files() -> list[Path]:
    """Every file that is or could be committed: tracked, or untracked and not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return sorted(path for name in listed.split("\0") if name and (path := ROOT / name).is_file())


def imports_of(path: Path, *, for_types: bool = True) -> set[str]:
    """Dotted names of all modules that a file imports, in functions included.

    Args:
        path: The file.
        for_types: Whether what stands under `if TYPE_CHECKING:` counts.
    """
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import at line {node.lineno}"
            assert node.module is not None
            found.add(node.module)
            if node.module == "bone_fx":
                found.update(f"bone_fx.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.If) and not for_types and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            waiting += node.orelse  # type: ignore[attr-defined]
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def room_of(path: Path) -> str:
    """The room a file of the package belongs to: its folder or, at the top, its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")
