"""The names that several adapter folders go by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bone_fx
from bone_fx.adapter_folder import read_adapter, read_adapters, write_adapter
from bone_fx.errors import UsageError

CONFIG = bone_fx.BoneConfig(r=4, target_modules=["lin"])


def written(root: Path, *names: str) -> list[Path]:
    for name in names:
        write_adapter(root / name, CONFIG, {"lin": torch.ones(4, 8)}, {})
    return [root / name for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ["run1/checkpoint-500", "run2/checkpoint-500"],
        ["chat", "run1/checkpoint-500", "run2/checkpoint-500"],
        ["a/run/last", "b/run/last", "b/other/last"],
    ],
)
def test_folders_of_one_name_are_told_apart_by_those_above(
    names: list[str], tmp_path: Path
) -> None:
    read = read_adapters(written(tmp_path, *names))
    given = [name for name, _ in read]
    assert given == (names if names[0] != "a/run/last" else [*names[:2], "other/last"])
    assert [folder.path for _, folder in read] == [tmp_path / name for name in names]


def test_one_folder_above_another_of_its_name(tmp_path: Path) -> None:
    outer, inner = written(tmp_path, "chat", "chat/chat")
    assert [name for name, _ in read_adapters([outer, inner])] == [
        f"{tmp_path.name}/chat",
        "chat/chat",
    ]


def test_one_adapter_is_the_default(tmp_path: Path) -> None:
    assert [name for name, _ in read_adapters(written(tmp_path, "chat"))] == ["default"]


def test_a_folder_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    (folder,) = written(tmp_path, "chat")
    link = tmp_path / "link"
    link.symlink_to(folder)
    for again in (folder, tmp_path / "chat" / ".." / "chat", link):
        with pytest.raises(UsageError, match="given twice"):
            read_adapters([folder, again])


def test_a_weight_of_a_site_that_is_not_under_base_layer_is_unused(tmp_path: Path) -> None:
    """PEFT looks for it at `base_layer`: the plain name means nothing to it."""
    weight = torch.ones(8, 8)
    trained = {"lin.weight": weight, "lin.bias": torch.ones(8), "norm.weight": torch.ones(8)}
    write_adapter(tmp_path / "plain", CONFIG, {"lin": torch.ones(4, 8)}, trained)
    adapter = read_adapter(tmp_path / "plain")
    assert list(adapter.modules_to_save) == ["norm.weight"]
    assert adapter.unused == ("base_model.model.lin.bias", "base_model.model.lin.weight")
    trained = {"lin.base_layer.weight": weight}
    write_adapter(tmp_path / "wrapped", CONFIG, {"lin": torch.ones(4, 8)}, trained)
    adapter = read_adapter(tmp_path / "wrapped")
    assert list(adapter.modules_to_save) == ["lin.weight"]
    assert adapter.unused == ()


def test_the_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", CONFIG, {"lin": torch.ones(4, 8)}, {})
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode & 0o777}


def test_one_path_is_no_list_of_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one path") as refused:
        read_adapters(str(tmp_path))
    assert refused.value.next_step == f"adapters=['{tmp_path}']"
