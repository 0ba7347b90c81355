"""Publishing deletes nothing but what a run made, and leaves nothing but what it published."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bone_fx.deploy import output_checks, staging
from bone_fx.deploy.earlier_output import files_of
from bone_fx.deploy.staging import staged
from bone_fx.errors import BoneFxError, ExportError, UsageError, VerificationError
from bone_fx.files import renames
from bone_fx.files.seal import sealed

Meanwhile = Callable[[staging.Staging], object]


def nothing(_: staging.Staging) -> None:
    """Nothing happens while the run works."""


def export(out: Path, content: str = "new", meanwhile: Meanwhile = nothing, **options: Any) -> None:
    """What an export does with its output, and what happens while it works."""
    options = {"overwrite": False, **options}
    with staged(out, **options) as stage:
        build(stage, content)
        meanwhile(stage)
        stage.publish({"format": 1, "kind": "module", "files": files_of(stage.folder)})


def raising(error: BaseException) -> Meanwhile:
    """A run that ends with an error."""

    def end(_: staging.Staging) -> None:
        raise error

    return end


def build(stage: staging.Staging, content: str) -> None:
    (stage.folder / "model.onnx").write_text(content)
    (stage.folder / "inner").mkdir()
    (stage.folder / "inner" / "tokenizer.json").write_text("{}")


def tree(folder: Path) -> dict[str, str]:
    """Every entry below a folder: links as where they lead, files as their content."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else ("/" if path.is_dir() else sha(path.read_bytes()))
        for path in sorted(folder.rglob("*"))
    }


def sha(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the system's exchange of two folders, and where there is none."""
    if request.param == "two renames":
        monkeypatch.setattr(renames, "_system_call", lambda: None)


@pytest.mark.usefixtures("ways")
def test_an_earlier_output_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    export(out, "old")
    export(out, "new", overwrite=True)
    assert (out / "model.onnx").read_text() == "new"
    assert names(out.parent) == ["out"]
    assert names(out) == ["bone_export.json", "inner", "model.onnx"]


def test_files_that_a_manifest_has_no_bytes_of_are_listed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged(out, overwrite=False) as stage:
        (stage.folder / "report.html").write_bytes(sealed("it took 3 s"))
        stage.publish({"files": {}})
    assert json.loads((out / "bone_export.json").read_text())["also_written"] == ["report.html"]
    written = (out / "report.html").read_bytes()
    (out / "report.html").write_bytes(written.replace(b"3 s", b"4 s"))
    with pytest.raises(UsageError, match=r"report\.html \(changed\)"):
        export(out, overwrite=True)
    (out / "report.html").write_bytes(written)
    export(out, overwrite=True)
    assert names(out) == ["bone_export.json", "inner", "model.onnx"]


def _notes(out: Path) -> None:
    (out / "notes.txt").write_text("mine")


def _inner(out: Path) -> None:
    (out / "inner" / "notes.txt").write_text("mine")


def _empty_folder(out: Path) -> None:
    (out / "results").mkdir()


def _link(out: Path) -> None:
    (out / "results").symlink_to(out.parent)


def _edited(out: Path) -> None:
    (out / "inner" / "tokenizer.json").write_text("[]")


def _linked_file(out: Path) -> None:
    (out / "model.onnx").unlink()
    (out / "model.onnx").symlink_to("/etc/hostname")


def _no_manifest(out: Path) -> None:
    (out / "bone_export.json").unlink()


def _other_manifest(out: Path) -> None:
    (out / "bone_export.json").write_text("{}")


def _deep_manifest(out: Path) -> None:
    (out / "bone_export.json").write_text("[" * 5000)


CHANGES = [
    *(_notes, _inner, _empty_folder, _link, _edited, _linked_file),
    *(_no_manifest, _other_manifest, _deep_manifest),
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_run_made_is_named_before_the_work(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(out)
    change(out)
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="nothing was deleted"):
        export(out, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("change", CHANGES)
def test_what_appears_while_the_run_works_stays(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(out)
    with pytest.raises(ExportError, match="appeared"):
        export(out, overwrite=True, meanwhile=lambda _: change(out))
    changed = tree(out)
    export(tmp_path / "other")
    change(tmp_path / "other")
    assert changed == tree(tmp_path / "other")
    assert names(tmp_path) == ["other", "out"]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "empty", "file", "link"])
def test_an_output_that_somebody_makes_meanwhile(
    kind: str, overwrite: bool, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def make(_: object) -> None:
        if kind == "file":
            out.write_text("mine")
        elif kind == "link":
            out.symlink_to("elsewhere")
        else:
            out.mkdir()
        if kind == "folder":
            _notes(out)

    with pytest.raises(ExportError, match="appeared"):
        export(out, overwrite=overwrite, meanwhile=make)
    after = tree(tmp_path)
    assert set(after) == ({"out", "out/notes.txt"} if kind == "folder" else {"out"})
    assert after["out"] == {"file": sha("mine"), "link": "elsewhere"}.get(kind, "/")


@pytest.mark.usefixtures("ways")
def test_an_empty_folder_that_is_filled_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(out, overwrite=True)
    assert (out / "model.onnx").exists()
    second = tmp_path / "second"
    second.mkdir()
    with pytest.raises(ExportError, match="appeared"):
        export(second, overwrite=True, meanwhile=lambda _: _notes(second))
    assert names(second) == ["notes.txt"]


@pytest.mark.usefixtures("ways")
def test_two_runs_at_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="appeared"):
        export(out, meanwhile=lambda _: export(out, "other"))
    assert (out / "model.onnx").read_text() == "other"
    export(out, "last", overwrite=True, meanwhile=lambda _: export(out, "first", overwrite=True))
    assert (out / "model.onnx").read_text() == "last"
    assert names(tmp_path) == ["out"]


def fail(
    out: Path, step: str | None = "look at <output>.rejected", **options: Any
) -> VerificationError:
    error = VerificationError("they differ", next_step=step)
    with pytest.raises(VerificationError) as caught:
        export(out, "wrong", meanwhile=raising(error), **options)
    return caught.value


def test_a_rejected_build_replaces_only_one_of_a_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert str(tmp_path / "out.rejected") in str(fail(out))
        assert names(tmp_path) == ["out.rejected"]
    _notes(tmp_path / "out.rejected")
    before = tree(tmp_path / "out.rejected")
    assert str(tmp_path / "out.rejected-2") in str(fail(out, None))
    assert tree(tmp_path / "out.rejected") == before


def test_a_rejected_build_that_is_an_input_now(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fail(out)
    before = tree(tmp_path / "out.rejected")
    fail(out, inputs=[tmp_path / "out.rejected"])
    assert tree(tmp_path / "out.rejected") == before
    assert names(tmp_path) == ["out.rejected", "out.rejected-2"]


@pytest.mark.parametrize("moment", ["building", "exchanged", "between two renames", "before"])
def test_the_next_run_clears_what_a_dead_one_left(moment: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "old")
    with staged(out, overwrite=True) as stage:
        build(stage, "new")
        if moment != "building":
            stage._write_manifest({"files": files_of(stage.folder)})
            (stage._work.path / "publishing").touch()
        if moment == "exchanged":
            out.rename(stage._work.path / "third")
            stage.folder.rename(out)
            (stage._work.path / "third").rename(stage.folder)
        elif moment == "between two renames":
            out.rename(stage._old)
        stage._work.release()  # as the system does when the process is killed
        left = stage._work.path
        left.rename(tmp_path / "aside")  # out of the reach of this one's own cleaning
    (tmp_path / "aside").rename(left)
    with pytest.raises(UsageError, match="exists"):
        export(out)
    assert names(tmp_path) == ["out"]
    assert (out / "model.onnx").read_text() == ("new" if moment == "exchanged" else "old")


def test_what_a_dead_run_left_with_a_persons_file_in_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, "old")
    with staged(out, overwrite=True) as stage:
        _notes(out)
        (stage._work.path / "publishing").touch()
        out.rename(stage._old)
        build(stage, "new")
        stage._write_manifest({"files": files_of(stage.folder)})
        stage.folder.rename(out)
        stage._work.release()
        stage._work.path.rename(tmp_path / "aside")
    (tmp_path / "aside").rename(stage._work.path)
    export(out, overwrite=True)
    assert names(tmp_path) == ["out", "out.kept-1"]
    assert (tmp_path / "out.kept-1" / "notes.txt").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    out, link = tmp_path / "disk" / "out", tmp_path / "link"
    export(out, "old")
    link.symlink_to(out)
    export(link, "new", overwrite=True)
    assert link.is_symlink()
    assert (out / "model.onnx").read_text() == "new"
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="no folder"):
        export(tmp_path / "loop", overwrite=True)


def test_what_cannot_be_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        outputs = ["file", "pipe", "socket", "\udcff", "a\0b", "x" * 238, ".", "..", ""]
        monkeypatch.chdir(tmp_path)
        before = names(tmp_path)
        for output in outputs:
            with pytest.raises(UsageError):
                export(output, overwrite=True)  # type: ignore[arg-type]
        with pytest.raises(BoneFxError):
            export(Path("new") / "/".join(["d" * 200] * 30), overwrite=True)
        assert names(tmp_path) == before
    export(tmp_path / ("x" * 237))
    assert names(tmp_path / ("x" * 237)) == ["bone_export.json", "inner", "model.onnx"]


def test_a_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, mounts = tmp_path / "a b", tmp_path / "mountinfo"
    out.mkdir()
    place = str(out).replace(" ", "\\040")
    mounts.write_text(f"36 35 98:0 /mnt1 {place} rw,noatime master:1 - ext3 /dev/root rw\n")
    monkeypatch.setattr(output_checks, "_MOUNTS", mounts)
    with pytest.raises(UsageError, match="mount point"):
        export(out, overwrite=True)
    assert out.exists()


def test_inputs_are_never_the_output(tmp_path: Path) -> None:
    base = tmp_path / "base"
    export(base)
    (tmp_path / "link").symlink_to(base)
    text = base / "model.onnx"
    for output in (base, tmp_path / "link", tmp_path, base / "inner", base / "new"):
        with pytest.raises(UsageError, match=r"overlaps the input|is or holds"):
            export(output, overwrite=True, inputs=[base])
    with pytest.raises(UsageError, match="overlaps the input"):
        export(base, overwrite=True, inputs=[text])


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """The folder `models`, which holds a base, mounted in another place too."""
    (tmp_path / "models/base").mkdir(parents=True)
    there = tmp_path / "mounted"
    there.mkdir()
    if not (mount := shutil.which("mount")):
        pytest.skip("no command `mount`")
    command = [mount, "--bind", str(tmp_path / "models"), str(there)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("folders cannot be mounted here")
    yield there
    subprocess.run(["umount", str(there)], check=True)


def test_an_input_that_is_mounted_in_two_places_is_one(mounted: Path, tmp_path: Path) -> None:
    base = tmp_path / "models/base"
    (base / "model.safetensors").touch()
    for output in (mounted / "base/out", mounted / "base"):
        with pytest.raises(UsageError, match="overlaps the input"):
            export(output, overwrite=True, inputs=[base])
        with pytest.raises(UsageError, match="overlaps the input"):
            export(base / "out", overwrite=True, inputs=[mounted / "base"])
    export(mounted / "out", inputs=[base])
    assert names(base) == ["model.safetensors"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EIO, errno.EDQUOT])
def test_a_disk_that_is_full_or_fails(number: int, tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep" / "out"
    with pytest.raises(ExportError, match="cannot be written") as caught:
        export(out, meanwhile=raising(OSError(number, os.strerror(number))))
    assert os.strerror(number) in str(caught.value)
    assert names(tmp_path) == []


def test_any_other_end_leaves_nothing(tmp_path: Path) -> None:
    for error in (KeyboardInterrupt(), RuntimeError("?"), SystemExit(3)):
        with pytest.raises(type(error)):
            export(tmp_path / "new" / "out", meanwhile=raising(error))
        assert names(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no umask")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*")}
    assert modes == {0o640, 0o750}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
