"""The graphs of a published folder, run without the base that they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bone_fx.deploy.genai_config import CONFIG_FILE
from bone_fx.deploy.options import FP8_CACHE
from bone_fx.deploy.variants import KIND as VARIANTS
from bone_fx.deploy.variants import run_variants
from bone_fx.deploy.verification import NOT_ON_THE_CPU
from bone_fx.onnx.writer import MODEL_FILE
from bone_fx.runtime.session import open_session


def run_alone(folder: Path, manifest: Mapping[str, Any], provider: str) -> tuple[str, ...]:
    """Load a graph, and generate with a decoder's folder; returns what a person should know."""
    from bone_fx.verify.decoder.genai_folder import verify_generation
    from bone_fx.verify.graph import WrittenGraph
    from bone_fx.verify.parity import TOLERANCE, Parity

    if manifest["kind"] == VARIANTS:
        for variant, said in manifest["variants"].items():
            _open(folder / f"{variant}.onnx", said, provider)
        if CONFIG_FILE in manifest["files"] and provider == "cpu":
            run_variants(folder, manifest["variants"])
        return (f"not compared with torch: {len(manifest['variants'])} graphs were run alone",)
    twin = _open(folder / MODEL_FILE, manifest, provider)
    notes = ["not compared with torch: pass --base, and --adapter for each adapter"]
    if twin:
        notes.append(f"{MODEL_FILE} not run: {NOT_ON_THE_CPU}")
    elif manifest["kind"] == "decoder" and provider == "cpu":
        parity = Parity(TOLERANCE["fp32"])
        verify_generation(parity, WrittenGraph(folder / MODEL_FILE, provider))
        notes += [f"{case} not run: {reason}" for case, reason in parity.skipped.items()]
    return tuple(notes)


def _open(path: Path, manifest: Mapping[str, Any], provider: str) -> bool:
    """Load a graph; returns whether it was the twin of one with a cache in fp8."""
    from bone_fx.verify.decoder.quantized_cache import runnable

    cache = manifest.get("kv_cache") or {}
    if provider == "cpu" and cache.get("dtype") == FP8_CACHE:
        runnable(path, provider).session()
        return True
    open_session(path, provider)
    return False
