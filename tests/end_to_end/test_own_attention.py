"""Exports of models with attention of their own, verified as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

import bone_fx
from tests.capture.decoder.decoders import DECODERS

ROW = {row.name: row for row in DECODERS}


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("falcon_alibi", "computes its attention by itself"),
        ("phi3_longrope_short", "one table for batches of at most 20 tokens"),
        ("llama_dynamic", "texts of at most 100 tokens"),
    ],
)
def test_the_export_is_the_model(name: str, note: str, tmp_path: Path) -> None:
    ROW[name].build().save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out")
    assert result.manifest["verification"]["figures"]["onnx_vs_unmerged"] <= 1e-5
    assert any(note in warning for warning in result.warnings)
