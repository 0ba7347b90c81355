"""Folders in which a run works: a live run's is never touched, a dead one's is found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bone_fx.files.work_folder import MARK, WorkFolder, dead_work_folders, make_work_folder


def dead(folder: Path, name: str = "out") -> list[Path]:
    found = list(dead_work_folders(folder, name))
    for each in found:
        each.release()
    return [each.path for each in found]


def test_a_live_one_is_no_dead_one(tmp_path: Path) -> None:
    work = make_work_folder(tmp_path, "out")
    assert dead(tmp_path) == []
    work.release()
    assert dead(tmp_path) == [work.path]
    assert dead(tmp_path, "ou") == dead(tmp_path, "other") == []


def test_another_process_has_one_as_long_as_it_lives(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; "
        "from bone_fx.files.work_folder import make_work_folder; "
        "work = make_work_folder(Path(sys.argv[1]), 'out'); print(work.path, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert dead(tmp_path) == []
    process.kill()
    process.communicate()
    assert dead(tmp_path) == [path]


def test_one_that_is_removed_leaves_nothing(tmp_path: Path) -> None:
    work = make_work_folder(tmp_path, "out")
    (work.path / "build" / "inner").mkdir(parents=True)
    (work.path / "build" / "inner" / "file").write_text("x")
    (tmp_path / "elsewhere").mkdir()
    (work.path / "link").symlink_to(tmp_path / "elsewhere")
    work.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    marks = ["{", '{"tool": "bone_fx", "for": "b"}', '{"tool": "bone_fx"}', '{"for": "out"}', "[]"]
    for number, mark in enumerate(marks):
        folder = tmp_path / f".out.staging-0000000{number}"
        folder.mkdir()
        (folder / MARK).write_text(mark)
    (tmp_path / ".out.staging-aaaaaaaa").mkdir()
    (tmp_path / ".out.staging-aaaaaaaa" / "thesis.txt").write_text("mine")
    (tmp_path / ".out.staging-mine").mkdir()
    os.mkfifo(tmp_path / ".out.staging-aaaaaaaa" / MARK)
    before = sorted(tmp_path.rglob("*"))
    assert dead(tmp_path) == []
    assert sorted(tmp_path.rglob("*")) == before


def test_what_a_run_left_in_its_first_moments(tmp_path: Path) -> None:
    (tmp_path / ".out.staging-00000000").mkdir()
    (tmp_path / ".out.staging-11111111").mkdir()
    (tmp_path / ".out.staging-11111111" / MARK).touch()
    assert [path.name for path in dead(tmp_path)] == [".out.staging-11111111"]
    assert not (tmp_path / ".out.staging-00000000").exists()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        work = make_work_folder(tmp_path, "out")
    finally:
        os.umask(before)
    assert work.path.stat().st_mode & 0o777 == 0o750
    work.remove()


def test_a_folder_that_cannot_hold_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_work_folder(tmp_path / "nowhere", "out")
    assert list(dead_work_folders(tmp_path / "nowhere", "out")) == []
    assert isinstance(make_work_folder(tmp_path, "out"), WorkFolder)
