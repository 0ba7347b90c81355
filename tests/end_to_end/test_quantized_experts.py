"""Exports of mixtures of experts in int4 and int8: verified, and told apart from products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bone_fx
from bone_fx.deploy.export import ExportResult
from tests.end_to_end.tiny import tiny_tokenizer
from tests.tiers import slow
from tests.verify.mixtures import MIXTURES

FIELDS = {"num_hidden_layers": 1, "moe_intermediate_size": 128, "intermediate_size": 128}
OF_ONE_LAYER: dict[str, dict[str, Any]] = {
    "gpt_oss_8": {"layer_types": ["full_attention"]},
    "glm4_moe_64": {"first_k_dense_replace": 0},
}
VALUES = 3 * 64 * 128
"""Of an expert."""
CUDA = {"provider": "cuda", "verify_on": "cpu", "block_size": 32, "symmetric": True}


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., ExportResult]:
    """Exports a model of the table with one layer."""

    def run(name: str, *, tokenizer: bool = False, **choices: Any) -> ExportResult:
        row = next(row for row in MIXTURES if row.name == name)
        row = replace(row, config={**row.config, **FIELDS, **OF_ONE_LAYER.get(name, {})})
        base = tmp_path / "base"
        row.build().save_pretrained(base)
        if tokenizer:
            tiny_tokenizer(base, 96)
        return bone_fx.export(base, output=tmp_path / "out", **choices)

    return run


@pytest.mark.parametrize(
    ("name", "choices", "experts", "ratio", "tolerance"),
    [
        ("mixtral_8", {"dtype": "int4", "tokenizer": True}, 8, 0.29, 1e-4),
        ("qwen3_moe_64", {"dtype": "int8", **CUDA}, 64, 0.55, 2e-2),
        *slow(("gpt_oss_8", {"dtype": "int8"}, 8, 0.55, 1e-4)),
        *slow(("olmoe_64", {"dtype": "int4", **CUDA}, 64, 0.29, 2e-2)),
    ],
)
def test_experts_are_quantized_and_verified(
    name: str,
    choices: dict[str, Any],
    experts: int,
    ratio: float,
    tolerance: float,
    export: Callable[..., ExportResult],
) -> None:
    manifest = export(name, **choices).manifest
    figures = manifest["verification"]["figures"]
    assert figures["onnx_vs_written"] <= tolerance < figures["onnx_vs_folded"]
    assert manifest["operators"]["com.microsoft::QMoE"] == 1
    assert "com.microsoft::MoE" not in manifest["operators"]
    found = manifest["quantization"]["experts"]
    weights_calibrated = found["weights"], found["calibrated"]
    assert weights_calibrated == (2, 2 if "tokenizer" in choices else 0)
    expected = {"mixtures": 1, "bits": int(choices["dtype"][3:]), "block_size": 32, "kept": {}}
    assert expected.items() <= found.items()
    assert found["bytes"] <= ratio * 2 * experts * VALUES
    if choices["dtype"] == "int4" and experts == 64:
        size = sum(file["bytes"] for file in manifest["files"].values())
        assert size <= 0.32 * 2 * experts * VALUES / 0.9
    skipped = " ".join(manifest["verification"]["skipped"])
    assert "scales" not in skipped


def test_experts_that_stay_are_a_warning_with_their_bytes(
    export: Callable[..., ExportResult],
) -> None:
    # Sigmoids choose these experts, so no one operator is their mixture.
    result = export("glm4_moe_64", dtype="int4", verify="off")
    nbytes = result.manifest["quantization"]["experts"]["kept_bytes"]
    assert nbytes == 4 * 64 * VALUES
    assert any(f"experts of {nbytes:,} bytes" in warning for warning in result.warnings)
