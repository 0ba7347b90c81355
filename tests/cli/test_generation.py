"""An export as a person sees it end, and the command that it names: text from the folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from bone_fx.cli.summary import export_lines
from bone_fx.runtime.generation import Conversation
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base, tiny_tokenizer

ROUNDED = {"onnx_vs_unmerged": 0.3}
PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with `base` and an export of it, and what the export said."""
    folder = tmp_path_factory.mktemp("generation")
    tiny_tokenizer(tiny_base(folder / "base"))
    tiny_adapter(folder / "adapter")
    done = run(folder / "base", "--adapter", folder / "adapter", "-o", folder / "out", "-q")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_last_lines_of_an_export(
    exported: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, said = exported
    manifest = json.loads((folder / "out" / "bone_export.json").read_text())
    figures = manifest["verification"]["figures"]
    first, verified, close, changed, command = said.splitlines()
    assert first.startswith(f"{folder / 'out'}: decoder in fp32, ")
    total = sum(entry["bytes"] for entry in manifest["files"].values())
    (shown,) = re.findall(r"([\d.]+) kB", first)
    assert float(shown) == pytest.approx(total / 1000, rel=5e-3)
    assert f"{manifest['verification']['cases']} cases against PyTorch, unmerged" in verified
    assert f"{figures['onnx_vs_unmerged']:.1e}" in close
    assert close.endswith("limit 1e-04")
    assert "6 weights" in changed
    assert f"{figures['adapter_effect']:.2g}" in changed
    _, _, typed = command.partition("run it: ")
    program, *arguments = shlex.split(typed)
    assert program == "bone-export"
    monkeypatch.chdir(folder.parent)
    assert run(*arguments, "--max-new-tokens", "2").returncode == 0


def test_the_last_lines_of_other_outputs(exported: tuple[Path, str]) -> None:
    out = exported[0] / "out"
    manifest = json.loads((out / "bone_export.json").read_text())
    lines = export_lines(out, {**manifest, "verification": None, "change": None})
    assert [line.strip() for line in lines[1:-1]] == ["verified: no, as --verify off asks for"]
    files = {name: file for name, file in manifest["files"].items() if name != "tokenizer.json"}
    assert "README.md, with onnxruntime" in export_lines(out, {**manifest, "files": files})[-1]
    variants = dict.fromkeys(("poet", "facts"), manifest)
    lines = export_lines(out, {**manifest, "change": None, "variants": variants})
    assert [line.split(":")[0].strip() for line in lines[3:5]] == [
        "changed by poet",
        "changed by facts",
    ]
    rounded = {**manifest["verification"], "figures": {"onnx_vs_written": 2e-6} | ROUNDED}
    lines = export_lines(out, {**manifest, "verification": rounded})
    assert [line.split(": ")[1] for line in lines[1:4]] == [
        f"{rounded['cases']} cases against PyTorch with the rounded weights",
        "2.0e-06 of the largest output apart, limit 1e-04",
        "outputs by 0.3 of the largest",
    ]
    done = run("verify", out, "--base", exported[0] / "base", "-q")
    assert "not those that were exported" in done.stderr


def test_text_is_that_of_transformers(exported: tuple[Path, str]) -> None:
    folder, _ = exported
    merged = folder / "merged"
    done = run("fold", folder / "base", "--adapter", folder / "adapter", "-o", merged, "-q")
    assert "6 folded weights, read back" in done.stdout
    assert "changed: 6 weights" in done.stdout
    model = LlamaForCausalLM.from_pretrained(merged)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    said = [{"role": "user", "content": PROMPT}]
    for plain, text in (
        (True, PROMPT),
        (False, tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)),
    ):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        expected = tokenizer.decode(tokens, skip_special_tokens=True)
        flags = ["--plain"] if plain else []
        arguments = ["generate", folder / "out", PROMPT, "--max-new-tokens", 12, *flags]
        done = run(*arguments)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{expected}\n"
        found = json.loads(run(*arguments, "--json").stdout)
        assert (found["prompt"], found["text"]) == (text, expected)


def test_it_streams(exported: tuple[Path, str]) -> None:
    conversation = Conversation(exported[0] / "out")
    pieces = conversation.generate(PROMPT, max_new_tokens=10_000)
    first = next(pieces)
    rest = list(pieces)
    assert len(rest) > 8
    assert run("generate", exported[0] / "out", PROMPT, "--plain").stdout.startswith(first)


def test_what_cannot_be_answered(exported: tuple[Path, str]) -> None:
    out = exported[0] / "out"
    long = run("generate", out, "the quick brown fox " * 40)
    assert long.returncode == 3
    assert "1 to 63 tokens" in long.stderr
    assert run("generate", out, "", "--plain").returncode == 3
    variant = run("generate", out, PROMPT, "--variant", "poet")
    assert variant.returncode == 2
    assert "no variant poet" in variant.stderr
    assert "expected: model" in variant.stderr
