"""Two exports of the same inputs are the same files, but for the page, which alone holds times."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification

import bone_fx
from tests.end_to_end.tiny import tiny_adapter, tiny_base
from tests.tiers import slow


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.html"
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    tiny_base(folder / "decoder")
    tiny_adapter(folder / "adapter")
    config = BertConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    BertForSequenceClassification(config).save_pretrained(folder / "encoder")
    return folder


@pytest.mark.parametrize(
    ("base", "dtype", "provider"),
    [("decoder", "int4", "cpu"), ("encoder", "fp16", "cuda"), *slow(("decoder", "fp16", "cuda"))],
)
def test_two_exports_are_the_same_bytes(
    base: str, dtype: Any, provider: Any, bases: Path, tmp_path: Path
) -> None:
    found = []
    for name in ("one", "two"):
        bone_fx.export(
            bases / base,
            output=tmp_path / name,
            adapters=[bases / "adapter"] if base == "decoder" else [],
            dtype=dtype,
            provider=provider,
            verify_on="cpu",
        )
        found.append(hashes(tmp_path / name))
    assert {"model.onnx", "model.onnx.data", "bone_export.json", "README.md"} <= set(found[0])
    assert found[0] == found[1]
