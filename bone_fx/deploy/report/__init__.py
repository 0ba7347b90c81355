"""What people read of a run: a page with everything, and a model card; see README.md."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bone_fx.deploy.report.timing import Timed
from bone_fx.files.seal import sealed

PAGE = "report.html"
CARD = "README.md"


def write_reports(folder: Path, manifest: Mapping[str, Any], timed: Timed) -> dict[str, Any]:
    """Write the model card and the page into the folder that will be published.

    The page alone holds times: the manifest has no bytes of it.

    Args:
        folder: The folder.
        manifest: The manifest of everything else in it.
        timed: How long the stages took.

    Returns:
        The manifest with the card among its files.
    """
    from bone_fx.deploy.report.card import card
    from bone_fx.deploy.report.page import page

    content = card(manifest).encode()
    (folder / CARD).write_bytes(content)
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    files = dict(sorted({**manifest["files"], CARD: entry}.items()))
    complete = {**manifest, "files": files}
    (folder / PAGE).write_bytes(sealed(page(complete, timed.stages())))
    return complete


def write_failure(folder: Path, manifest: Mapping[str, Any], timed: Timed, error: str) -> None:
    """Write the page of a build that failed verification, which is kept beside the output."""
    from bone_fx.deploy.report.page import page

    with suppress(OSError):  # what is wrong with the build matters more
        (folder / PAGE).write_bytes(sealed(page(manifest, timed.stages(), error)))
