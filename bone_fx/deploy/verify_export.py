"""`verify_export`: a published folder, verified again later or on another machine.

1. The manifest is read, and every file that it lists is hashed.
2. Without the base there is nothing to compare with: the graph is loaded, and onnxruntime-genai
   generates with a decoder's folder.
3. With it, the base's and the adapters' files must be those of the manifest, and the verification
   of the export is run again (`deploy.verification.verify_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.builds.checkpoint_graph import random_inputs
from bone_fx.deploy.checkpoint_inputs import CheckpointInputs, open_checkpoint
from bone_fx.deploy.companions.choice import choose_companions
from bone_fx.deploy.earlier_output import MANIFEST, read_manifest
from bone_fx.deploy.manifest import adapter_entry, figures_of
from bone_fx.deploy.options import Provider, Verify
from bone_fx.deploy.verification import Exported, verify_checkpoint
from bone_fx.errors import UsageError, VerificationError
from bone_fx.onnx.writer import MODEL_FILE
from bone_fx.progress import Progress, Silent
from bone_fx.runtime.session import open_session, require_provider
from bone_fx.weights.storage.safetensors_file import file_sha256


@dataclass(frozen=True)
class VerifyResult:
    """What a verification of a published folder found.

    Attributes:
        output: The folder.
        files: How many files are as the manifest says.
        verification: Figures and cases of the comparison with torch; None without the base.
        warnings: What a person should know.
    """

    output: Path
    files: int
    verification: dict[str, Any] | None = field(repr=False)
    warnings: tuple[str, ...] = ()


def verify_export(
    output: str | Path,
    *,
    base: str | Path | None = None,
    adapters: Sequence[str | Path] = (),
    provider: Provider = "cpu",
    verify: Verify = "full",
    samples: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_unused: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Verify a published folder again; nothing is written.

    Args:
        output: The folder, with its `bone_export.json`.
        base: The base that it was made from; None compares the files and runs the graph only.
        adapters: The adapters, in the order in which they applied.
        provider: ONNX Runtime's provider to run on.
        verify: `"full"` or `"fast"`.
        samples: A text whose likelihood is measured, as for `export`.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
        allow_unused: Tensors that may be left out, as for `export`.
        progress: Gets the stages.

    Raises:
        VerificationError: A file is another than the manifest says, or the graph and torch differ.
        BoneFxError: Another of its kinds.

    Example:
        >>> import bone_fx, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
        >>> with tempfile.TemporaryDirectory() as d:
        ...     model.save_pretrained(f"{d}/base")
        ...     _ = bone_fx.export(f"{d}/base", output=f"{d}/out")
        ...     result = bone_fx.verify_export(f"{d}/out", base=f"{d}/base")
        >>> result.verification["figures"]["onnx_vs_unmerged"] < 1e-4
        True
    """
    folder = Path(output).expanduser()
    progress = progress or Silent()
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            f"{output} is no output of an export or a fold",
            expected=f"a folder with {MANIFEST}",
            next_step="give the folder that was passed to -o",
        )
    if adapters and base is None:
        raise UsageError("adapters go with their base", next_step="pass --base too")
    progress.stage("hash the files")
    files = _check_files(folder, manifest["files"], "")
    if manifest.get("kind") == "checkpoint" or not (folder / MODEL_FILE).is_file():
        return VerifyResult(folder, files, None, ("a folded checkpoint: its files were hashed",))
    require_provider(provider)
    if base is None:
        progress.stage(f"run the graph on {provider}")
        warnings = _run_alone(folder, manifest, provider)
        return VerifyResult(folder, files, None, warnings)
    progress.stage("read the inputs")
    inputs = open_checkpoint(
        base,
        read_adapters(adapters),
        trust_remote_code=trust_remote_code,
        revision=revision,
        allow_unused=allow_unused or (),
    )
    _check_inputs(inputs, manifest)
    progress.stage(f"verify ({verify}, on {provider})")
    exported = exported_of(folder, manifest, inputs, provider)
    parity = verify_checkpoint(exported, inputs, provider, verify, samples)
    return VerifyResult(folder, files, figures_of(parity), tuple(parity.warnings))


def exported_of(
    folder: Path, manifest: Mapping[str, Any], inputs: CheckpointInputs, provider: str
) -> Exported:
    """A published folder as verification meets it.

    Raises:
        UsageError: The provider has no kernels for its dtype.
    """
    if manifest["activations"] == "bf16" and provider == "cpu":
        raise UsageError(
            "ONNX Runtime does not load a bf16 model on the CPU provider",
            next_step="--provider cuda",
        )
    is_decoder = manifest["kind"] == "decoder"
    companions = choose_companions(inputs.checkpoint.folder, inputs.adapters)
    fold = inputs.fold(torch.float32)
    return Exported(
        folder=folder,
        activations=manifest["activations"],
        quantized=manifest["quantization"] is not None,
        examples=None if is_decoder else random_inputs(fold.skeleton.model),
        tokenizer=companions.tokenizer_folder,
    )


def _check_files(folder: Path, listed: Mapping[str, Any], of: str) -> int:
    """Hash the files of a folder that a manifest lists; returns how many."""
    for name, entry in listed.items():
        path = folder / name
        expected = entry["sha256"] if isinstance(entry, dict) else entry
        if expected is None:
            continue
        if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
            raise VerificationError(
                f"verification failed: {of}{name} is missing",
                found=str(path),
                next_step="export again, or give the files that were exported",
            )
        if file_sha256(path) != expected:
            raise VerificationError(
                f"verification failed: {of}{name} is another file than {MANIFEST} says",
                expected=f"SHA-256 {expected}",
                found=f"SHA-256 {file_sha256(path)}",
                next_step="export again, or give the files that were exported",
            )
    return len(listed)


def _check_inputs(inputs: CheckpointInputs, manifest: Mapping[str, Any]) -> None:
    """Refuse another base or other adapters than those that were exported."""
    hashes = inputs.checkpoint.sha256()
    exported = {n: h for n, h in manifest["base"]["files"].items() if n in hashes}
    if hashes != exported:
        differ = [name for name in hashes if exported.get(name) != hashes[name]]
        raise VerificationError(
            f"verification failed: {', '.join(differ)} of the base is another file than was"
            " exported",
            expected=f"the base {manifest['base']['name']}",
            next_step="give the base that was exported, or export again",
        )
    given = [adapter_entry(name, adapter)["files"] for name, adapter in inputs.adapters]
    listed = [entry["files"] for entry in manifest["adapters"]]
    if given != listed:
        names = [entry["name"] for entry in manifest["adapters"]]
        raise VerificationError(
            "verification failed: the adapters are not those that were exported",
            expected=", ".join(names) or "none",
            found=", ".join(name for name, _ in inputs.adapters) or "none",
            next_step="pass --adapter once for each, in their order",
        )


def _run_alone(folder: Path, manifest: Mapping[str, Any], provider: str) -> tuple[str, ...]:
    """Load a graph, and generate with a decoder's folder; returns what a person should know."""
    from bone_fx.verify.decoder.genai_folder import verify_generation
    from bone_fx.verify.graph import WrittenGraph
    from bone_fx.verify.parity import TOLERANCE, Parity

    open_session(folder / MODEL_FILE, provider)
    notes = ["not compared with torch: pass --base, and --adapter for each adapter"]
    if manifest["kind"] == "decoder" and provider == "cpu":
        parity = Parity(TOLERANCE["fp32"])
        verify_generation(parity, WrittenGraph(folder / MODEL_FILE, provider))
        notes += [f"{case} not run: {reason}" for case, reason in parity.skipped.items()]
    return tuple(notes)
