"""What a published folder holds, against what its manifest says and the inputs that are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bone_fx.deploy.checkpoint_inputs import CheckpointInputs
from bone_fx.deploy.companions.choice import hashes_beside_weights
from bone_fx.deploy.earlier_output import BESIDE, MANIFEST, not_made_by_a_run
from bone_fx.deploy.genai_config import CONFIG_FILE
from bone_fx.deploy.manifest import adapter_entry
from bone_fx.deploy.variants import KIND as VARIANTS
from bone_fx.errors import UsageError, VerificationError, printable, some
from bone_fx.files.seal import is_sealed
from bone_fx.onnx.writer import DATA_FILE, MODEL_FILE
from bone_fx.weights.storage.safetensors_file import file_sha256

_FILES = {
    "decoder": MODEL_FILE,
    "model": MODEL_FILE,
    "module": MODEL_FILE,
    "checkpoint": "config.json",
}
"""A file that each kind of output has."""
_BESIDE_GRAPH = (DATA_FILE, CONFIG_FILE)
_ACTIVATIONS = ("fp32", "fp16", "bf16")


def check_fields(output: str | Path, manifest: Mapping[str, Any], *, compared: bool) -> None:
    """Refuse a manifest that does not say what it was made from, as one that was edited may."""
    kind, base, adapters = (manifest.get(name) for name in ("kind", "base", "adapters"))
    is_known = isinstance(kind, str) and _FILES.get(kind) in manifest["files"]
    if kind == VARIANTS:
        variants = manifest.get("variants")
        is_known = isinstance(variants, dict) and bool(variants)
        is_known = is_known and all(f"{name}.onnx" in manifest["files"] for name in variants or ())
    is_whole = not compared or (
        isinstance(base, dict)
        and {"name", "files"} <= set(base)
        and isinstance(base["files"], dict)
        and isinstance(adapters, list)
        and all(isinstance(a, dict) and {"name", "files"} <= set(a) for a in adapters)
        and (
            kind == "checkpoint"
            or (manifest.get("activations") in _ACTIVATIONS and "quantization" in manifest)
        )
    )
    if not is_known or not is_whole:
        lacking = "was made from" if is_known else "is"
        raise UsageError(
            f"{MANIFEST} of {output} does not say what the output {lacking}",
            expected="kind, files, activations, quantization, base and adapters, as written",
            next_step="leave out --base to look at the files, or export again"
            if is_known
            else "export again",
        )


def check_files(folder: Path, manifest: Mapping[str, Any]) -> int:
    """Hash the files of a folder that a manifest lists; returns how many."""
    listed: Mapping[str, Any] = manifest["files"]
    for name in [*listed, *manifest.get(BESIDE, ())]:
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise VerificationError(
                f"verification failed: {name} is missing",
                expected=str(path),
                next_step="copy the whole folder again, or export again",
            )
        expected = listed[name].get("sha256") if name in listed else None
        found = file_sha256(path)
        if found != expected and not (name not in listed and is_sealed(path.read_bytes())):
            raise VerificationError(
                f"verification failed: {name} is another file than {MANIFEST} says",
                expected=f"SHA-256 {expected}" if name in listed else "the page as it was written",
                found=f"SHA-256 {found}",
                next_step="export again, or give the files that were exported",
            )
    return len(listed)


def other_files(folder: Path) -> tuple[str, ...]:
    """A note on files in the folder that its manifest does not list.

    Raises:
        VerificationError: One of them belongs to the graph.
    """
    foreign = not_made_by_a_run(folder)
    if read := [name for name in foreign if name in (*_FILES.values(), *_BESIDE_GRAPH)]:
        raise VerificationError(
            f"verification failed: {read[0]} is not listed in {MANIFEST}",
            expected="the files that were exported",
            found=some(read),
            next_step="copy the whole folder again, or export again",
        )
    if not foreign:
        return ()
    return (printable(f"not of this output, and not looked at: {some(foreign)}", lines=False),)


def check_inputs(inputs: CheckpointInputs, manifest: Mapping[str, Any]) -> None:
    """Refuse another base or other adapters than those that were exported."""
    from bone_fx.base.loading import cache_root

    checkpoint, exported = inputs.checkpoint, manifest["base"]["files"]
    hashes = checkpoint.sha256()
    # What stands beside a GGUF file's weights is written here, by this machine's transformers.
    if checkpoint.folder.is_relative_to(cache_root()):
        exported = {name: sha256 for name, sha256 in exported.items() if name in hashes}
    else:
        hashes |= hashes_beside_weights(checkpoint.folder)
    names = sorted({*hashes, *exported})
    differ = [name for name in names if exported.get(name) != hashes.get(name)]
    if differ:
        raise VerificationError(
            f"verification failed: {', '.join(differ)} of the base is another file than was"
            " exported",
            expected=f"the base {manifest['base']['name']}, as it was exported",
            found=f"another, or none, in {checkpoint.folder}",
            next_step="pass the --base (and --revision) that was exported",
        )
    given = [adapter_entry(name, adapter)["files"] for name, adapter in inputs.adapters]
    listed = [entry["files"] for entry in manifest["adapters"]]
    if given != listed:
        labels = [entry["name"] for entry in manifest["adapters"]]
        raise VerificationError(
            "verification failed: the adapters are not those that were exported",
            expected=", ".join(labels) or "none",
            found=", ".join(name for name, _ in inputs.adapters) or "none",
            next_step="pass --variant NAME=DIR with the adapter that each was made from"
            if "variants" in manifest
            else "pass --adapter once for each, in their order",
        )
