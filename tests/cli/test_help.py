"""Help that fits a terminal, the version, and the shell's completion."""

from __future__ import annotations

import subprocess
import sys

import pytest

import bone_fx
from bone_fx.cli.commands import COMPLETION, program
from tests.command import run

CALLS = [(), *((name,) for name in program().commands)]


@pytest.mark.parametrize("columns", [80, 44])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: "".join(call) or "program")
def test_help_fits(call: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    done = run(*call, "--help")
    assert done.returncode == 0
    assert not [line for line in done.stdout.splitlines() if len(line) > columns]
    lines = [line.strip() for line in done.stdout.splitlines()]
    for parameter in program().commands[call[0]].params if call else program().params:
        assert not parameter.opts or parameter.help, parameter.name
        name = parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
        assert any(name in line for line in lines), name


def test_help_of_a_call_without_a_command() -> None:
    assert run("./base", "--help").stdout == run("export", "-h").stdout
    assert "--kv-cache" in run("--help", "./base").stdout


def test_version() -> None:
    for call in (["--version"], ["-q", "--version"]):
        done = run(*call)
        assert (done.returncode, done.stdout) == (0, f"bone-export {bone_fx.__version__}\n")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("bone-export ge", ["generate"]),
        ("bone-export fold ./base --ov", ["--overwrite"]),
        ("bone-export ./base --ada", ["--adapter"]),
        ("bone-export export ./base --provider ", ["cpu", "cuda"]),
    ],
)
def test_completion(typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(COMPLETION, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" ")) - 1))
    done = run()
    assert done.returncode == 0
    assert done.stdout.split() == offered


def test_script_of_a_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    done = run("--show-completion")
    assert done.returncode == 0
    assert COMPLETION in done.stdout
    assert "bone-export" in done.stdout


def test_help_and_wrong_calls_load_nothing_heavy() -> None:
    code = (
        "import sys\nfrom bone_fx.cli import main\n"
        "for call in (['--help'], ['fold', '--help'], ['x', '--dtype', 'gpu'], ['--version']):\n"
        "    sys.argv[1:] = call\n"
        "    try:\n        main()\n    except SystemExit:\n        pass\n"
        "print('loaded', *{'torch', 'transformers', 'rich', 'numpy', 'onnx'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "loaded"
