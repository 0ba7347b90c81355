"""Wrong calls: each answer says what is wrong and what to type next, in exit code and words."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base

# Arguments, exit code, what is wrong, what is next. They run in a folder with `base`, `my-adapter`
# and `texts.txt`.
CALLS: list[tuple[str, int, str, str]] = [
    # commands
    ("exprot base -o out", 2, "no command exprot: it is called export", "bone-export export"),
    ("verfy out", 2, "no command verfy: it is called verify", "bone-export verify"),
    ("docter", 2, "no command docter: it is called doctor", "bone-export doctor"),
    ("merge base --adapter my-adapter -o out", 2, "it is called fold", "bone-export fold"),
    ("chat out hello", 2, "no command chat: it is called generate", "bone-export generate"),
    # missing arguments
    ("base", 2, "--output OUT is missing", "bone-export BASE -o OUT"),
    ("-o out", 2, "BASE is missing", "bone-export BASE -o OUT"),
    ("fold base -o out", 2, "--adapter [NAME=]DIR is missing", "fold BASE --adapter DIR -o OUT"),
    ("verify", 2, "OUT is missing", "bone-export verify OUT"),
    ("inspect", 2, "ADAPTER is missing", "bone-export inspect ADAPTER"),
    ("generate out", 2, "PROMPT is missing", 'generate OUT "PROMPT"'),
    ("base -o", 2, "-o is given without its value", "bone-export export --help"),
    # flags
    ("base -o out --adaptr my-adapter", 2, "no option --adaptr", "did you mean --adapter?"),
    ("--verison", 2, "no option --verison", "did you mean --version?"),
    ("verify --hlep", 2, "no option --hlep", "did you mean --help?"),
    ("base -o out --trust_remote_code", 2, "--trust_remote_code", "mean --trust-remote-code?"),
    ("base --output-dir out", 2, "no option --output-dir", "did you mean --output?"),
    ("base -o out --precision fp16", 2, "no option --precision", "did you mean --dtype?"),
    ("base -o out --device cuda", 2, "no option --device", "did you mean --provider?"),
    ("base -o out --lora my-adapter", 2, "no option --lora", "did you mean --adapter?"),
    ("base -o out --force", 2, "no option --force", "did you mean --overwrite?"),
    ("base -o out --no-verify", 2, "no option --no-verify", "did you mean --verify off?"),
    ("--model base -o out", 2, "no option --model: BASE stands", "bone-export BASE -o OUT"),
    ("generate out --prompt hi", 2, "no option --prompt: PROMPT stands", 'generate OUT "PROMPT"'),
    ("base -output out", 2, "no option -output", "--output, with two dashes"),
    ("base -o out -adapter my-adapter", 2, "no option -adapter", "--adapter, with two dashes"),
    ("fold base --adapter my-adapter -o out --dtype fp16", 2, "only export", "fold --help"),
    ("base -o out --frobnicate", 2, "no option --frobnicate", "bone-export export --help"),
    # values
    ("base -o out --dtype float16", 2, "float16 is called fp16 here", "--dtype fp16"),
    ("base -o out --dtype BF16", 2, "BF16 is called bf16 here", "--dtype bf16"),
    ("base -o out --dtype=4bit", 2, "4bit is called int4 here", "--dtype int4"),
    ("base -o out --dtype fp8", 2, "--dtype", "fp16"),
    ("base -o out --provider gpu", 2, "gpu is called cuda here", "--provider cuda"),
    ("verify base --provider CUDAExecutionProvider", 2, "is called cuda here", "--provider cuda"),
    ("base -o out --verify none", 2, "none is called off here", "--verify off"),
    ("base -o out --kv-cache fp16", 2, "fp16 is called float here", "--kv-cache float"),
    ("base -o out --dtype int4 --block-size many", 2, "--block-size", "export --help"),
    ("base -o out --dtype int4 --block-size 17", 2, "block_size=17", "choose one of these"),
    ("generate base hi --max-new-tokens 0", 2, "--max-new-tokens", "generate --help"),
    ("base -o out --block-size 32", 2, "goes with a quantized export", "choose such a dtype"),
    # one argument too many
    ("base my-adapter -o out", 2, "is an adapter without its option", "--adapter my-adapter"),
    ("generate out who are you", 2, "extra argument", "put the prompt in quotes"),
    # paths
    ("./bse -o out", 3, "./bse does not exist", "did you mean ./base?"),
    ("./nested/bse -o out", 3, "does not exist", "did you mean ./nested/base?"),
    ("basee -o out", 3, "basee is no local folder", "did you mean base?"),
    ("./base --adapter ./my-adaptr -o out", 3, "no adapter folder", "did you mean my-adapter?"),
    ("inspect my-adaptr", 3, "no adapter folder", "did you mean my-adapter?"),
    ("verify ./bas", 2, "no output of an export", "did you mean base?"),
    ("generate ./bas hi", 2, "no decoder that generates text", "did you mean base?"),
    ("generate base hi", 2, "no decoder that generates text", "output of an export"),
    ("base -o out --samples text.txt", 2, "text.txt", "did you mean texts.txt?"),
    ("my-adapter -o out", 3, "my-adapter", "next:"),
    # adapters and their names
    ("base -o out --adapter a=my-adapter --adapter a=other", 2, "called a", "--adapter NAME="),
    ("base -o out --adapter a=", 2, "names no folder", "--adapter a=./my-adapter"),
    ("base -o out --adapter my-adapter --adapter my-adapter", 2, "given twice", "name it once"),
    ("base -o out --variant my-adapter", 2, "does not name a variant", "--variant poet="),
    ("base --adapter owner/adapter -o out", 3, "owner/adapter", "check the spelling"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calls")
    tiny_base(folder / "base")
    (folder / "nested").mkdir()
    (folder / "nested" / "base").symlink_to(folder / "base")
    tiny_adapter(folder / "my-adapter")
    (folder / "texts.txt").write_text("a text")
    return folder


@pytest.mark.parametrize(("call", "code", "wrong", "step"), CALLS, ids=[c[0] for c in CALLS])
def test_an_answer_says_what_is_wrong_and_what_to_type(
    call: str, code: int, wrong: str, step: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(folder.rglob("*"))
    done = run(*call.split())
    assert done.returncode == code, done.stderr
    assert wrong in done.stderr
    assert step in done.stderr
    assert re.search(r"^  next: +\S", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stdout + done.stderr
    assert sorted(folder.rglob("*")) == before


def test_there_are_forty_of_them() -> None:
    assert len({call for call, *_ in CALLS}) >= 40


def test_an_answer_as_json(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    content = json.loads(run("base", "-o", "out", "--dtype", "float16", "--json").stdout)
    assert (content["exit_code"], content["error"]) == (2, "UsageError")
    assert "--dtype fp16" in content["message"]


def test_generation_without_genai(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("genai_config.json", "tokenizer.json"):
        (folder / "nested" / name).write_text("{}")
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    done = run("generate", folder / "nested", "hello")
    assert done.returncode == 7
    assert "pip install 'bone_fx[genai]'" in done.stderr
