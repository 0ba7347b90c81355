"""Folders that somebody gave: links that leave them, pipes and devices, files out of bounds."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from bone_fx.adapter_folder import read_adapter
from bone_fx.base.loading import open_base
from bone_fx.errors import AdapterError, BaseModelError
from bone_fx.files.inputs import unsafe_entries
from bone_fx.files.json_file import NotJsonError, read_object
from tests.end_to_end.tiny import tiny_adapter, tiny_base


def test_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "alias.json").symlink_to("config.json")
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").symlink_to("../config.json")
    (tmp_path / "gone").symlink_to("nowhere")
    assert unsafe_entries(tmp_path) == []


def _link(place: Path) -> None:
    place.symlink_to("/etc/hostname")


def _link_to_folder(place: Path) -> None:
    place.symlink_to("/etc")


def _link_by_link(place: Path) -> None:
    place.with_name("between").symlink_to("/etc/hostname")
    place.symlink_to("between")


def _socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, TemporaryDirectory() as short:
        listener.bind(f"{short}/s")  # a name of a socket has at most 107 bytes
        os.rename(f"{short}/s", place)


def _device(place: Path) -> None:
    place.symlink_to("/dev/zero")


UNSAFE = [_link, _link_to_folder, _link_by_link, os.mkfifo, _socket, _device]


@pytest.mark.parametrize("make", UNSAFE)
@pytest.mark.parametrize("name", ["vocab.txt", "1_Pooling/config.json"])
def test_what_is_not_read(name: str, make: Callable[[Path], None], tmp_path: Path) -> None:
    base, adapter = tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")
    for folder in (base, adapter):
        place = folder / name
        place.parent.mkdir(exist_ok=True)
        make(place)
        assert any(name in entry for entry in unsafe_entries(folder))
    with pytest.raises(BaseModelError, match="links that leave it, or no regular files"):
        open_base(base)
    with pytest.raises(AdapterError, match="links that leave it, or no regular files"):
        read_adapter(adapter)


def test_a_snapshot_of_the_hubs_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0f3a", repository / "blobs"
    tiny_base(snapshot)
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert open_base(snapshot).tensors
    (snapshot / "vocab.txt").symlink_to("../../refs")
    (repository / "refs").write_text("x")
    assert len(unsafe_entries(snapshot)) == 1
    (snapshot / "vocab.txt").unlink()
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BaseModelError, match="links that leave it"):
        open_base(snapshot)


def test_a_base_that_is_no_file_and_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe.gguf", "loop"):
        with pytest.raises(BaseModelError, match="is no file and no folder"):
            open_base(tmp_path / name)
    with pytest.raises(BaseModelError, match="is no file and no folder"):
        open_base("/dev/null")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 5000 + "]" * 5000, "nested too deeply"),
        ('{"a": ' * 3000 + "1" + "}" * 3000, "nested too deeply"),
        ('{"r": ' + "9" * 5000 + "}", "digits"),
        ("", "Expecting value"),
        ("[1]", "no object but list"),
        ("\udcff\udcfe", "utf-8"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_out_of_bounds(content: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(NotJsonError, match=why):
        read_object(path)


def test_json_that_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError):
        read_object(path)
    os.mkfifo(path)
    with pytest.raises(NotJsonError, match="no regular file"):
        read_object(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(NotJsonError, match="bytes, more than"):
        read_object(path)
