"""`bone_export.json`: what was exported from what, with which versions, and what was verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bone_fx.adapter_folder import WEIGHTS_NAME, AdapterFolder, Adapters
from bone_fx.config import CONFIG_NAME
from bone_fx.deploy.companions.choice import hashes_beside_weights
from bone_fx.deploy.earlier_output import files_of
from bone_fx.deploy.options import ExportOptions
from bone_fx.deploy.report.origin import read_origin
from bone_fx.verify.parity import Parity
from bone_fx.weights.storage.safetensors_file import file_sha256

if TYPE_CHECKING:
    import onnx_ir as ir

    from bone_fx.deploy.builds import Build, Written

_NUMPY = {"FLOAT": "float32", "DOUBLE": "float64", "BFLOAT16": "bfloat16"}
"""Names of dtypes that are not ONNX's in small letters."""

_OF_MODELS = "models--"
"""What the hub's cache has before the id of a model or an adapter."""
_PACKAGES = (
    "bone_fx",
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime-gpu",
    "onnxruntime",
    "safetensors",
)


def manifest_of(
    kind: str,
    *,
    architecture: str,
    base_name: str,
    base_files: Mapping[str, str],
    base_origin: Mapping[str, Any],
    adapters: Adapters,
    entries: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a manifest.

    No times and no absolute paths, so that the same inputs give the same bytes.

    Args:
        kind: What was published: `"decoder"`, `"model"`, `"module"` or `"checkpoint"`.
        architecture: Class name of the model.
        base_name: Name of the base, without its path.
        base_files: SHA-256 of the base's weight files by name.
        base_origin: Licence and base of the base, as its files state them.
        adapters: The adapters by name, in the order in which they apply.
        entries: What only this kind of output has.
    """
    return {
        "format": 1,
        "kind": kind,
        "architecture": architecture,
        "base": {"name": base_name, "files": dict(base_files), **base_origin},
        "adapters": [adapter_entry(name, adapter) for name, adapter in adapters],
        **entries,
        "versions": versions(),
    }


def export_manifest(
    build: Build,
    written: Written,
    parity: Parity | None,
    *,
    adapters: Adapters,
    options: ExportOptions,
    folder: Path,
) -> dict[str, Any]:
    """The manifest of an ONNX export.

    Args:
        build: What was exported.
        written: What was written of it.
        parity: What was compared with torch; None if nothing was.
        adapters: The adapters by name, in the order in which they apply.
        options: What the person chose.
        folder: The folder that will be published.
    """
    from bone_fx.onnx.torch_exporter import OPSET

    return manifest_of(
        build.kind,
        architecture=build.architecture,
        base_name=build.base_name,
        base_files=build.base_files(),
        base_origin=build.origin(),
        adapters=adapters,
        entries={
            "dtype": build.dtype,
            "activations": build.activations,
            "quantization": build.quantization,
            "kv_cache": build.kv_cache,
            "change": written.change or None,
            "rounding": written.rounding,
            "placement": None if build.placement is None else build.placement.report(),
            "provider": options.provider,
            "opset": OPSET,
            "graph": _signature(build.model),
            "operators": operator_counts(folder / "model.onnx"),
            "files": files_of(folder, written.sha256),
            "verified": parity is not None,
            "verification": None if parity is None else _verification_entry(parity, options),
            "notes": [*build.notes, *written.notes],
        },
    )


def _verification_entry(parity: Parity, options: ExportOptions) -> dict[str, Any]:
    return {
        "mode": options.verify,
        "provider": options.verification_provider,
        **figures_of(parity),
    }


def figures_of(parity: Parity) -> dict[str, Any]:
    """What a comparison with torch found, as a manifest says it."""
    return {
        "reference": parity.reference,
        "tolerance": parity.tolerance,
        "figures": {name: float(f"{value:.3g}") for name, value in parity.figures.items()},
        "cases": len(parity.cases),
        "ran": list(dict.fromkeys(case.partition(": ")[0] for case in parity.cases)),
        "skipped": parity.skipped,
        "warnings": parity.warnings,
    }


def adapter_entry(name: str, adapter: AdapterFolder) -> dict[str, Any]:
    """What a manifest says of an adapter."""
    return {
        "name": name,
        "folder": folder_name(adapter.path),
        "peft_type": adapter.config.peft_type,
        "method": adapter.config.method,
        "r": adapter.config.r,
        "sites": list(adapter.blocks),
        "modules_to_save": list(adapter.modules_to_save),
        "files": {
            **{file: file_sha256(adapter.path / file) for file in (CONFIG_NAME, WEIGHTS_NAME)},
            **hashes_beside_weights(adapter.path),
        },
        **_adapter_origin(adapter),
    }


def folder_name(path: Path) -> str:
    """The name of an adapter's folder; of one in the hub's cache its id, not its commit."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith(_OF_MODELS):
        return repository.removeprefix(_OF_MODELS).replace("--", "/")
    return path.name


def _adapter_origin(adapter: AdapterFolder) -> dict[str, Any]:
    """Licence and base of an adapter; PEFT notes the base in its configuration."""
    origin = read_origin(adapter.path)
    named = adapter.config.base_model_name_or_path
    return {**({"base_model": [named]} if named else {}), **origin}


def _signature(model: ir.Model) -> dict[str, dict[str, str]]:
    """Inputs and outputs of a graph by name, such as `int64[batch, 3]`."""
    graph = model.graph
    return {
        kind: {str(value.name): _kind_of(value) for value in values}
        for kind, values in (("inputs", graph.inputs), ("outputs", graph.outputs))
    }


def _kind_of(value: ir.Value) -> str:
    dtype = "" if value.dtype is None else _NUMPY.get(value.dtype.name, value.dtype.name.lower())
    dims = (
        ()
        if value.shape is None
        else (str(d) if isinstance(d, int) else str(d.value) for d in value.shape)
    )
    return f"{dtype}[{', '.join(dims)}]"


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
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
