"""What a command did, in words: the last lines of an export, a fold and a verification."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

_REFERENCES = {
    "onnx_vs_written": "PyTorch with the rounded weights",
    "onnx_vs_unmerged": "PyTorch, unmerged",
    "onnx_vs_torch": "the module in PyTorch",
}
"""What a graph was held to, by the figure that is held to the limit: the first that there is."""
_ROUNDED = "onnx_vs_unmerged"
"""The figure that says, beside that with the rounded weights, what rounding costs."""


def export_lines(output: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What an export published: verified against what, how close, change, size, how to run it.

    Args:
        output: The folder.
        manifest: Its manifest.
    """
    kind = manifest["kind"]
    return [
        f"{output}: {kind} in {manifest['dtype']}, {_size(manifest)}, published",
        *_verified(manifest["verification"]),
        *_change(manifest),
        f"  run it: {_command(output, manifest)}",
    ]


def fold_lines(output: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What a fold published.

    Args:
        output: The folder.
        manifest: Its manifest.
    """
    return [
        f"{output}: a checkpoint, {_size(manifest)}, published",
        *(f"  verified: {done}" for done in manifest["verification"]["ran"]),
        *_change(manifest),
        f"  export it: bone-export {_shown(output)} -o OUT",
    ]


def convert_lines(output: Path, kind: str, errors: Mapping[str, float]) -> list[str]:
    """What a conversion published, and how far each layer is off where it was rounded.

    Args:
        output: The folder.
        kind: `peft_type`.
        errors: Relative error by layer; empty where all are exact.
    """
    lines = [f"{output}: a {kind} adapter, published"]
    if not errors:
        return [*lines, "  exact: it changes every weight as the adapter did"]
    lost = [f"  {error:.3f} of the change is lost: {name}" for name, error in errors.items()]
    worst, middle = max(errors.values()), median(errors.values())
    return [
        *lines,
        *lost,
        f"  rounded: at most {worst:.3f} of a layer's change is lost, {middle:.3f} in the middle",
        "  a higher --approximate keeps more, and bone-export fold everything",
    ]


def verify_lines(output: Path, files: int, verification: Mapping[str, Any] | None) -> list[str]:
    """What a verification found in an output.

    Args:
        output: The folder.
        files: How many files are as the manifest says.
        verification: Figures of the comparison; None if nothing was compared.
    """
    lines = [f"{output}: {files} files as exported"]
    return lines if verification is None else [*lines, *_verified(verification)]


def _verified(verification: Mapping[str, Any] | None) -> list[str]:
    """Against what, and how close."""
    if verification is None:
        return ["  verified: no, as --verify off asks for"]
    figures = verification["figures"]
    name = next((each for each in _REFERENCES if each in figures), "")
    lines = [
        f"  verified: {verification['cases']} cases against {_REFERENCES.get(name, 'PyTorch')}"
    ]
    if name:
        apart, limit = figures[name], verification["tolerance"]
        lines.append(f"  how close: {apart:.1e} of the largest output apart, limit {limit:.0e}")
    if name != _ROUNDED and _ROUNDED in figures:
        lines.append(f"  rounding: outputs by {figures[_ROUNDED]:.2g} of the largest")
    return lines


def _change(manifest: Mapping[str, Any]) -> list[str]:
    """What the adapters change, a line a variant; nothing for an output without any."""
    variants = manifest.get("variants") or {}
    named = {f" by {name}": entry for name, entry in variants.items()} or {"": manifest}
    return [
        f"  changed{name}: {_moved(entry['change'], entry['verification'])}"
        for name, entry in named.items()
        if entry.get("change")
    ]


def _moved(change: Mapping[str, float | None], verification: Mapping[str, Any] | None) -> str:
    known = [ratio for ratio in change.values() if ratio is not None] or [0.0]
    moved = f"{len(change)} weights by {median(known):.2g} of their norm, {max(known):.2g} at most"
    effect = (verification or {}).get("figures", {}).get("adapter_effect")
    return moved if effect is None else f"{moved}; outputs by {effect:.2g}"


def _size(manifest: Mapping[str, Any]) -> str:
    """Bytes of all files, in the unit that a person reads."""
    count = float(sum(entry["bytes"] for entry in manifest["files"].values()))
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _command(output: Path, manifest: Mapping[str, Any]) -> str:
    """What to type to run an output."""
    if {"genai_config.json", "tokenizer.json"} <= set(manifest["files"]):
        return f'bone-export generate {_shown(output)} "Who are you?"'
    return f"the example in {_shown(output / 'README.md')}, with onnxruntime"


def _shown(path: Path) -> str:
    """A path as it is typed from here."""
    here = Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
