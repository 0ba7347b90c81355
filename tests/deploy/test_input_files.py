"""No output may be, hold or lie in anything that a run reads, through whatever link."""

from __future__ import annotations

from pathlib import Path

import pytest

from bone_fx.base.gguf import LAYOUT
from bone_fx.deploy.input_files import files_read
from bone_fx.deploy.output_checks import check_output
from bone_fx.errors import UsageError


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("base/sub", "adapter", "elsewhere", "out"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("base/model.safetensors", "base/sub/shard", "adapter/a", "elsewhere/file"):
        (tmp_path / name).write_text("x")
    return tmp_path


def check(folders: Path, output: str = "out", **texts: str) -> None:
    texts_read = [folders / text for text in texts.values()]
    read = files_read(folders / "base", [folders / "adapter"], texts_read)
    check_output(folders / output, read, overwrite=True)


def test_folders_apart_are_taken(folders: Path) -> None:
    (folders / "base" / "linked").symlink_to(folders / "elsewhere" / "file")
    (folders / "base" / "nowhere").symlink_to(folders / "missing")
    check(folders, text="elsewhere/file")
    assert files_read(object()) == []


@pytest.mark.parametrize("output", ["base", "base/new", "adapter/sub", "."])
def test_inputs_are_no_outputs(output: str, folders: Path) -> None:
    with pytest.raises(UsageError, match="overlaps"):
        check(folders, output)


def test_a_text_in_the_output_is_an_input(folders: Path) -> None:
    (folders / "out" / "text").write_text("words")
    with pytest.raises(UsageError, match="overlaps"):
        check(folders, text="out/text")


@pytest.mark.parametrize("link", ["base/model.safetensors", "base/sub/shard", "adapter/a"])
@pytest.mark.parametrize("output", ["out", "out/.."])
def test_files_behind_links_are_inputs(output: str, link: str, folders: Path) -> None:
    (folders / "deep" / "out" / "inside").mkdir(parents=True)
    target = folders / "deep" / "out" / "inside" / "blob"
    (folders / link).rename(target)
    (folders / link).symlink_to(target)
    with pytest.raises(UsageError, match="overlaps"):
        check(folders, f"deep/{output}")


def test_a_link_in_the_output_is_an_input(folders: Path) -> None:
    """The file would stay, but the name by which it is read would go."""
    (folders / "out" / "text").symlink_to(folders / "elsewhere" / "file")
    (folders / "elsewhere" / "again").symlink_to(folders / "out" / "text")
    with pytest.raises(UsageError, match="read through"):
        check(folders, text="elsewhere/again")


def test_dequantized_files_in_the_cache_are_inputs(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BONE_FX_CACHE", str(folders / "cache"))
    (folders / "cache" / f"{LAYOUT}-00ff").mkdir(parents=True)
    check(folders, "cache/out")
    with pytest.raises(UsageError, match="overlaps"):
        check(folders, "cache")
