"""Constants of a written graph against the model's own parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import bone_fx
from bone_fx.errors import VerificationError
from tests.end_to_end.tiny import tiny_base


def test_a_row_of_nan_is_named_as_nan(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"][-1] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match="NaN or Inf in the output"):
        bone_fx.export(base, output=tmp_path / "out", verify="fast")
