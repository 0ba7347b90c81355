"""int4 exports of a decoder that counts errors by what its products see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import bone_fx
from bone_fx.errors import UsageError
from tests.end_to_end.test_same_bytes import hashes
from tests.end_to_end.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base with a tokenizer of 127 words, and an adapter."""
    top = tmp_path_factory.mktemp("calibrated")
    base = tiny_base(top / "base")
    number_tokenizer(base)
    return base, tiny_adapter(top / "adapter")


def number_tokenizer(folder: Path) -> None:
    words = {"?": 0, **{str(number): number for number in range(1, 127)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)


def export(folders: tuple[Path, Path], output: Path, **choices: Any) -> bone_fx.ExportResult:
    choices = {"dtype": "int4", "verify": "off", **choices}
    return bone_fx.export(folders[0], output=output, adapters=[folders[1]], **choices)


def test_built_in_text_verified_and_the_same_bytes(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    found = [export(folders, tmp_path / name, verify="full") for name in ("one", "two")]
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    used = found[0].manifest["quantization"]["calibration"]
    assert used["text"] == "built-in"
    assert used["tokens"] == 4 * 64
    assert used["products"] == found[0].manifest["quantization"]["products"] - 1  # the head is int8
    assert not any("calibrated" in note for note in found[0].warnings)


def test_own_text_and_none_are_other_bytes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(str(7 * i % 127) for i in range(70)))
    own = export(folders, tmp_path / "own", calibration=text)
    off = export(folders, tmp_path / "off", calibration="none")
    export(folders, tmp_path / "default")
    used = own.manifest["quantization"]["calibration"]
    assert (used["text"], used["tokens"]) == ("numbers.txt", 64)
    assert off.manifest["quantization"]["calibration"] is None
    weights = {hashes(tmp_path / name)["model.onnx.data"] for name in ("own", "off", "default")}
    assert len(weights) == 3


def test_base_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    result = bone_fx.export(base, output=tmp_path / "out", dtype="int4", verify="off")
    assert any("no tokenizer" in note and "int4" in note for note in result.warnings)
    assert result.manifest["quantization"]["calibration"] is None


def test_an_adapters_tokenizer_reads_the_text(tmp_path: Path) -> None:
    folders = tiny_base(tmp_path / "base"), tiny_adapter(tmp_path / "adapter")
    number_tokenizer(folders[1])
    result = export(folders, tmp_path / "out")
    assert result.manifest["quantization"]["calibration"]["tokens"] == 4 * 64


def test_int8_needs_no_calibration(folders: tuple[Path, Path], tmp_path: Path) -> None:
    result = export(folders, tmp_path / "out", dtype="int8")
    assert result.manifest["quantization"]["calibration"] is None


def test_refusals(folders: tuple[Path, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" ")
    with pytest.raises(UsageError, match="empty"):
        export(folders, tmp_path / "out", calibration=empty)
    with pytest.raises(UsageError, match="no file"):
        export(folders, tmp_path / "out", calibration=tmp_path / "missing.txt")
    for dtype in ("fp16", "int8"):
        with pytest.raises(UsageError, match=dtype):
            export(folders, tmp_path / "out", calibration=empty, dtype=dtype)
