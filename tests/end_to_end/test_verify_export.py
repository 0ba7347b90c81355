"""`bone-export verify`: an output verified again, alone and against base and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import bone_fx
from bone_fx.errors import UsageError, VerificationError
from bone_fx.weights.storage.safetensors_file import file_sha256
from tests.command import run
from tests.end_to_end.tiny import tiny_adapter, tiny_base, tiny_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, an adapter, a text, and an export that was not verified."""
    folder = tmp_path_factory.mktemp("verified")
    tiny_tokenizer(tiny_base(folder / "base"))
    tiny_adapter(folder / "adapter")
    (folder / "text").write_text(TEXT)
    bone_fx.export(
        folder / "base", adapters=[folder / "adapter"], output=folder / "out", verify="off"
    )
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_against_the_base(folder: Path) -> None:
    result = bone_fx.verify_export(
        folder / "out",
        base=folder / "base",
        adapters=[folder / "adapter"],
        samples=folder / "text",
    )
    assert result.verification is not None
    figures = result.verification["figures"]
    assert figures["onnx_vs_unmerged"] < 1e-5
    assert figures["long_texts"] < 1e-5
    assert figures["nll_export"] == pytest.approx(figures["nll_adapter"], rel=1e-2)
    assert abs(figures["nll_base"] - figures["nll_adapter"]) > 0.05
    ran = result.verification["ran"]
    assert "onnxruntime-genai" in ran
    assert "tokenizer.json" in ran
    assert any("after a past of" in case for case in ran)


def test_a_fast_verification_reads_no_samples(folder: Path, tmp_path: Path) -> None:
    choices: dict[str, Any] = {"samples": folder / "text", "verify": "fast"}
    with pytest.raises(UsageError, match="samples are read by a full verification"):
        bone_fx.verify_export(folder / "out", base=folder / "base", **choices)
    with pytest.raises(UsageError, match="samples are read by a full verification"):
        bone_fx.export(folder / "base", output=tmp_path / "out", **choices)
    assert not (tmp_path / "out").exists()


def test_alone_on_the_command_line(folder: Path) -> None:
    done = run("verify", folder / "out", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    listed = json.loads((folder / "out" / "bone_export.json").read_text())["files"]
    assert found["files"] == len(listed)
    assert found["verification"] is None
    assert "pass --base" in done.stderr


def test_a_changed_file(folder: Path, tmp_path: Path) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    with (out / "model.onnx.data").open("r+b") as data:
        data.seek(1000)
        data.write(b"\x01")
    with pytest.raises(VerificationError, match=r"model\.onnx\.data is another file"):
        bone_fx.verify_export(out)


def test_a_missing_file(folder: Path, tmp_path: Path) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    (out / "genai_config.json").unlink()
    with pytest.raises(VerificationError, match=r"genai_config\.json is missing"):
        bone_fx.verify_export(out)


def test_other_adapters(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="adapters are not those"):
        bone_fx.verify_export(folder / "out", base=folder / "base")
    other = tiny_adapter(tmp_path / "other", std=0.3)
    with pytest.raises(VerificationError, match="adapters are not those"):
        bone_fx.verify_export(folder / "out", base=folder / "base", adapters=[other])


def test_another_base(folder: Path, tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", initializer_range=0.1)
    with pytest.raises(VerificationError, match="of the base is another file"):
        bone_fx.verify_export(folder / "out", base=base, adapters=[folder / "adapter"])
    for name in ("config.json", "tokenizer.json"):
        other = copy_of(folder / "base", tmp_path / f"other {name}")
        (other / name).write_text((other / name).read_text() + "\n")
        with pytest.raises(VerificationError, match=rf"{name} of the base is another file"):
            bone_fx.verify_export(folder / "out", base=other, adapters=[folder / "adapter"])


@pytest.mark.parametrize("field", ["activations", "quantization", "base", "adapters"])
def test_a_manifest_that_lacks_a_field(field: str, folder: Path, tmp_path: Path) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    content = json.loads((out / "bone_export.json").read_text())
    del content[field]
    (out / "bone_export.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="does not say what the output was made from"):
        bone_fx.verify_export(out, base=folder / "base", adapters=[folder / "adapter"])
    assert bone_fx.verify_export(out).verification is None


def test_no_output_of_ours(folder: Path) -> None:
    with pytest.raises(UsageError, match="no output of an export"):
        bone_fx.verify_export(folder / "base")


def test_a_folded_checkpoint(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded"
    bone_fx.fold_checkpoint(folder / "base", adapters=[folder / "adapter"], output=out)
    assert bone_fx.verify_export(out).verification is None
    (out / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json is another file"):
        bone_fx.verify_export(out)


def test_samples_of_no_text(folder: Path, tmp_path: Path) -> None:
    done = run(folder / "base", "-o", tmp_path / "out", "--samples", tmp_path / "none")
    assert done.returncode == 2
    assert "is no file" in done.stderr


@pytest.mark.parametrize("alone", [False, True])
def test_a_failure_of_a_published_folder_names_no_rejected_build(
    folder: Path, tmp_path: Path, *, alone: bool
) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    genai, manifest = out / "genai_config.json", out / "bone_export.json"
    old, new = ("past_key_values", "past") if alone else ('"head_size": 16', '"head_size": 8')
    genai.write_text(genai.read_text().replace(old, new))
    content = json.loads(manifest.read_text())
    content["files"]["genai_config.json"]["sha256"] = file_sha256(genai)
    manifest.write_text(json.dumps(content))
    inputs: dict[str, Any] = {"base": folder / "base", "adapters": [folder / "adapter"]}
    expected = "does not run the folder" if alone else "head_size"
    with pytest.raises(VerificationError, match=expected) as caught:
        bone_fx.verify_export(out, verify="fast", **({} if alone else inputs))
    assert "rejected" not in str(caught.value)
    assert "export again" in str(caught.value)


def test_what_cannot_be_verified(folder: Path, tmp_path: Path) -> None:
    assert run("verify", folder / "out", "--verify", "off").returncode == 2
    with pytest.raises(UsageError, match="compares nothing"):
        bone_fx.verify_export(folder / "out", verify="off")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="samples go with their base"):
        bone_fx.verify_export(folder / "out", samples=folder / "text")
    out = tmp_path / "out"
    out.mkdir()
    manifest: dict[str, Any] = {"kind": "rejected", "error": "they differ", "files": {}}
    (out / "bone_export.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="they differ"):
        bone_fx.verify_export(out)
    (out / "bone_export.json").write_text(json.dumps({**manifest, "kind": "module"}))
    with pytest.raises(UsageError, match="no base"):
        bone_fx.verify_export(out, base=folder / "base")


def edited(out: Path, **fields: Any) -> Path:
    manifest = out / "bone_export.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **fields}))
    return out


@pytest.mark.parametrize("fields", [{"files": {}}, {"kind": "something"}, {"kind": ["decoder"]}])
def test_a_manifest_that_does_not_say_what_the_output_is(
    fields: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    out = edited(copy_of(folder / "out", tmp_path / "out"), **fields)
    with pytest.raises(UsageError, match="does not say what the output is"):
        bone_fx.verify_export(out)


@pytest.mark.parametrize("fields", [{"activations": "fp8"}, {"kind": "model"}])
def test_a_manifest_of_another_output(fields: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    out = edited(copy_of(folder / "out", tmp_path / "out"), **fields)
    with pytest.raises((UsageError, VerificationError), match=r"made from|none of the model's"):
        bone_fx.verify_export(out, base=folder / "base", adapters=[folder / "adapter"])


@pytest.mark.parametrize("name", ["model.onnx.data", "genai_config.json"])
def test_a_part_of_the_graph_that_the_manifest_does_not_list(
    name: str, folder: Path, tmp_path: Path
) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    files = json.loads((out / "bone_export.json").read_text())["files"]
    edited(out, files={key: entry for key, entry in files.items() if key != name})
    with pytest.raises(VerificationError, match=rf"{name} is not listed"):
        bone_fx.verify_export(out)


def test_a_file_beside_an_output_is_named(folder: Path, tmp_path: Path) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    (out / "special_tokens_map.json").write_text("{}")
    warnings = bone_fx.verify_export(out).warnings
    assert any("not looked at: special_tokens_map.json" in warning for warning in warnings)


@pytest.mark.parametrize("content", [None, "<p>verified</p>"])
def test_a_page_that_is_gone_or_changed(content: str | None, folder: Path, tmp_path: Path) -> None:
    out = copy_of(folder / "out", tmp_path / "out")
    page = out / "report.html"
    page.unlink() if content is None else page.write_text(content)
    with pytest.raises(VerificationError, match=r"report\.html is (missing|another file)"):
        bone_fx.verify_export(out)


def test_a_folded_checkpoint_and_its_inputs(folder: Path, tmp_path: Path) -> None:
    base, adapter, out = folder / "base", folder / "adapter", tmp_path / "folded"
    bone_fx.fold_checkpoint(base, adapters=[adapter], output=out)
    assert bone_fx.verify_export(out, base=base, adapters=[adapter]).verification is None
    with pytest.raises(VerificationError, match="adapters are not those"):
        bone_fx.verify_export(out, base=base)
    with pytest.raises(VerificationError, match="of the base is another file"):
        bone_fx.verify_export(out, base=tiny_base(tmp_path / "base"), adapters=[adapter])


def test_a_provider_of_no_name(folder: Path) -> None:
    with pytest.raises(UsageError, match="pass cpu or cuda"):
        bone_fx.verify_export(folder / "out", provider="npu")  # type: ignore[arg-type]
