"""`bone_export.json`: what was exported from what, with which versions, and what was verified."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.adapter_folder import WEIGHTS_NAME, AdapterFolder
from bone_fx.config import CONFIG_NAME
from bone_fx.verify.parity import Parity

if TYPE_CHECKING:
    from bone_fx.deploy.builds import Build

_PACKAGES = (
    "bone_fx",
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime-gpu",
    "safetensors",
)


def manifest_of(
    build: Build,
    adapters: Sequence[tuple[str, AdapterFolder]],
    provider: str,
    verify: str,
    verified_on: str,
    parity: Parity | None,
    folder: Path,
) -> dict[str, Any]:
    """The manifest's content.

    No times and no absolute paths, so that the same inputs give the same bytes.
    """
    return {
        "format": 1,
        "kind": build.kind,
        "architecture": build.architecture,
        "base": {"name": build.base_name, "files": build.base_files()},
        "adapters": adapter_entries(adapters),
        "dtype": build.dtype,
        "activations": build.activations or build.dtype,
        "quantization": build.quantization,
        "rounding": build.rounding.report() if build.rounding is not None else None,
        "placement": build.placement.report() if build.placement is not None else None,
        "provider": provider,
        "opset": build.opset,
        "operators": operator_counts(folder / "model.onnx"),
        "files": {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": build.written.get(path.relative_to(folder).as_posix()) or sha256(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
        "verified": parity is not None,
        "verification": None
        if parity is None
        else {
            "mode": verify,
            "provider": verified_on,
            "tolerance": parity.tolerance,
            "figures": {name: float(f"{value:.3g}") for name, value in parity.figures.items()},
            "cases": len(parity.cases),
            "warnings": parity.warnings,
        },
        "notes": build.notes,
        "versions": versions(),
    }


def adapter_entries(adapters: Sequence[tuple[str, AdapterFolder]]) -> list[dict[str, Any]]:
    """What a manifest says about the adapters, in the order in which they apply."""
    return [
        {
            "name": name,
            "peft_type": adapter.config.peft_type,
            "method": adapter.config.method,
            "r": adapter.config.r,
            "sites": list(adapter.blocks),
            "modules_to_save": list(adapter.modules_to_save),
            "files": {n: sha256(adapter.path / n) for n in (CONFIG_NAME, WEIGHTS_NAME)},
        }
        for name, adapter in adapters
    ]


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write the manifest as JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def operator_counts(model: Path) -> dict[str, int]:
    """Nodes of a model file by operator; `domain::Name` outside the default domain."""
    import onnx

    nodes = onnx.load(model, load_external_data=False).graph.node
    return dict(
        sorted(
            Counter(f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in nodes).items()
        )
    )


def versions() -> dict[str, str]:
    """Versions of the packages that make an export."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
