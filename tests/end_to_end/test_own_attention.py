"""Exports of models with attention of their own, verified as any other."""

from __future__ import annotations

from pathlib import Path

import pytest

import bone_fx
from bone_fx.capture.decoder import session
from bone_fx.errors import VerificationError
from tests.capture.decoder.decoders import DECODERS
from tests.tiers import slow

ROW = {row.name: row for row in DECODERS}


@pytest.mark.parametrize(
    ("name", "note"),
    [
        *slow(("falcon_alibi", "computes its attention by itself")),
        ("gpt_neo", "computes its attention by itself"),
        ("phi3_longrope_short", "one table for batches of at most 20 tokens"),
        ("llama_dynamic", "texts of at most 100 tokens"),
    ],
)
def test_the_export_is_the_model(name: str, note: str, tmp_path: Path) -> None:
    ROW[name].build().save_pretrained(tmp_path / "base")
    result = bone_fx.export(tmp_path / "base", output=tmp_path / "out")
    assert result.manifest["verification"]["figures"]["onnx_vs_unmerged"] <= 1e-5
    assert any(note in warning for warning in result.warnings)


def test_padding_longer_than_a_window_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "counts_slots", lambda _: False)
    ROW["gpt_neo"].build(window_size=40).save_pretrained(tmp_path / "base")
    with pytest.raises(VerificationError, match=r"padded by 41.*attention.out_proj"):
        bone_fx.export(tmp_path / "base", output=tmp_path / "out")
