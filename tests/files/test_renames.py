"""Renames that replace nothing, with the system's call and without it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bone_fx.files import renames
from bone_fx.files.renames import exchange, rename_new


@pytest.fixture(params=["renameat2", "mkdir and rename"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "mkdir and rename":
        monkeypatch.setattr(renames, "_system_call", lambda: None)


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.usefixtures("ways")
def test_a_name_that_is_free_is_taken(tmp_path: Path) -> None:
    rename_new(folder(tmp_path / "a", "a"), tmp_path / "b")
    assert (tmp_path / "b" / "file").read_text() == "a"
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
def test_what_has_the_name_stays(kind: str, tmp_path: Path) -> None:
    source, target = folder(tmp_path / "a", "a"), tmp_path / "b"
    if kind == "folder":
        folder(target, "b")
    elif kind == "empty":
        target.mkdir()
    elif kind == "file":
        target.write_text("b")
    else:
        target.symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        rename_new(source, target)
    assert (source / "file").exists()
    assert (target / "file" if kind == "folder" else target).lstat()


def test_two_folders_change_places(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "a", "a"), folder(tmp_path / "b", "b")
    expected = ("b", "a") if exchange(one, other) else ("a", "b")
    assert ((one / "file").read_text(), (other / "file").read_text()) == expected


@pytest.mark.skipif(renames._system_call() is None, reason="no renameat2 here")
def test_an_exchange_needs_both(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(folder(tmp_path / "a", "a"), tmp_path / "b")
