"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

import bone_fx
from bone_fx.progress import Lines
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.train.peft_models import net, x_of_net

MB = 1_000_000


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO, total: int) -> str:
    with Lines(stream) as lines:
        lines.stage("write the model")
        for part in range(101):
            lines.advance(part * total // 100, total)
        lines.stage("verify")
    return stream.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    text = shown(io.StringIO(), 400 * MB)
    assert "\x1b" not in text
    assert "\r" not in text
    assert [line.strip() for line in text.splitlines() if "of" in line] == [
        f"{done} of 400 MB" for done in (0, 100, 200, 300, 400)
    ]


@pytest.mark.parametrize("columns", [80, 44])
def test_a_bar_with_bytes_and_time_on_a_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", shown(Terminal(), 400 * MB))
    drawn = [line for line in re.split(r"[\r\n]+", text) if "MB" in line]
    assert any("100.0/400.0 MB" in line for line in drawn)
    assert all(re.search(r"\d+:\d\d|-:--", line) for line in drawn)
    assert max(map(len, drawn)) <= columns
    assert text.splitlines()[-1].endswith("] verify")


def test_small_models_show_stages_only() -> None:
    assert len(shown(Terminal(), MB).splitlines()) == 2


def test_a_terminal_that_is_gone_does_not_end_a_run() -> None:
    stream = Terminal()
    with Lines(stream) as lines:
        lines.stage("write the model")
        lines.advance(0, 400 * MB)
        stream.close()
        lines.advance(200 * MB, 400 * MB)
        lines.stage("verify")


class Told:
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def advance(self, done: int, total: int) -> None:
        pass


def test_adapt_tells_its_stages_where_there_is_something_to_wait_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = bone_fx.BoneConfig(r=8, target_modules=["lin0"])
    told = Told()
    bone_fx.adapt(net(), config, [x_of_net()], progress=told)
    assert told.stages == [
        "trace Net",
        "compare the graph with the model",
        "insert the adapter",
    ]
    assert capsys.readouterr().err == ""
    bone_fx.adapt(net(), config, [x_of_net()])  # a small one
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("bone_fx.train.origin.WORTH_SHOWING", 1000)
    bone_fx.adapt(net(), config, [x_of_net()])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == told.stages
    bone_fx.adapt(net(), config, [x_of_net()], progress=False)
    assert capsys.readouterr().err == ""


def test_a_fold_in_python_tells_its_stages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")
    capsys.readouterr()
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=tmp_path / "loud")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("] ")[2] for line in lines] == [
        *("read the inputs", "fold the weights", "verify", "publish")
    ]
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=tmp_path / "quiet", progress=False)
    assert capsys.readouterr().err == ""
