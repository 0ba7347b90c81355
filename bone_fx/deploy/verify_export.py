"""`verify_export`: a published folder, verified again later or on another machine.

1. The manifest is read, and every file that it lists is hashed; files that it does not list are
   named.
2. Without the base there is nothing to compare with: the graph is loaded, and onnxruntime-genai
   generates with a decoder's folder. Of a folder with variants, every graph is loaded.
3. With it, the base's and the adapters' files must be those of the manifest, and the verification
   of the export is run again (`deploy.verification.verify_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from bone_fx.adapter_folder import read_adapters
from bone_fx.deploy.builds.checkpoint_graph import random_inputs
from bone_fx.deploy.checkpoint_inputs import CheckpointInputs, open_checkpoint
from bone_fx.deploy.companions.choice import choose_companions, hashes_beside_weights
from bone_fx.deploy.earlier_output import (
    BESIDE,
    MANIFEST,
    REJECTED,
    not_made_by_a_run,
    read_manifest,
)
from bone_fx.deploy.genai_config import CONFIG_FILE
from bone_fx.deploy.input_files import local_adapters
from bone_fx.deploy.manifest import adapter_entry, figures_of
from bone_fx.deploy.options import Compared, Provider
from bone_fx.deploy.variants import KIND as VARIANTS
from bone_fx.deploy.variants import run_variants
from bone_fx.deploy.verification import Exported, verify_checkpoint
from bone_fx.errors import KEPT, UsageError, VerificationError, printable, some
from bone_fx.files.nearby import meant
from bone_fx.files.seal import is_sealed
from bone_fx.onnx.writer import DATA_FILE, MODEL_FILE
from bone_fx.progress import Progress, Silent
from bone_fx.runtime.session import open_session, require_provider
from bone_fx.weights.storage.safetensors_file import file_sha256

_FOLDED = "a folded checkpoint: its files were hashed; only ONNX outputs are compared with a base"
_FILES = {
    "decoder": MODEL_FILE,
    "model": MODEL_FILE,
    "module": MODEL_FILE,
    "checkpoint": "config.json",
}
"""A file that each kind of output has."""
_BESIDE_GRAPH = (DATA_FILE, CONFIG_FILE)
_ACTIVATIONS = ("fp32", "fp16", "bf16")


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
    adapters: Sequence[str | Path] | Mapping[str, str | Path] = (),
    provider: Provider = "cpu",
    verify: Compared = "full",
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
        adapters: The adapters, folders or hub ids, in the order in which they applied.
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

    Examples:
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
            next_step=meant(output, "give the folder that was passed to -o"),
        )
    for name, given in (("adapters", adapters), ("samples", samples)):
        if given and base is None:
            raise UsageError(f"{name} go with their base", next_step="pass --base too")
    if verify not in get_args(Compared):
        raise UsageError(f"verify={verify!r} compares nothing", next_step="pass full or fast")
    if provider not in get_args(Provider):
        raise UsageError(f"provider={provider!r} is none", next_step="pass cpu or cuda")
    if manifest.get("kind") == REJECTED:
        raise VerificationError(
            f"{output} is a build that failed verification",
            found=manifest.get("error"),
            next_step="export again",
        )
    if manifest.get("kind") == "module" and base is not None:
        raise UsageError(
            f"{output} is an export of a module, which has no base", next_step="leave out --base"
        )
    is_of_variants = manifest.get("kind") == VARIANTS
    if is_of_variants and base is not None:
        raise UsageError(
            f"{output} holds several variants, which were compared before they got one data file",
            next_step="leave out --base, or export the variant alone and verify that",
        )
    _check_fields(output, manifest, compared=base is not None)
    is_folded = manifest["kind"] == "checkpoint"
    progress.stage("hash the files")
    files = _check_files(folder, manifest)
    notes = _other_files(folder)
    if not is_folded:
        require_provider(provider)
    if base is None:
        if is_folded:
            return VerifyResult(folder, files, None, (_FOLDED, *notes))
        progress.stage(f"run the graph on {provider}")
        try:
            alone = _run_alone(folder, manifest, provider)
        except VerificationError as error:
            raise _of_a_published_folder(error) from error
        return VerifyResult(folder, files, None, (*alone, *notes))
    progress.stage("read the inputs")
    inputs = open_checkpoint(
        base,
        read_adapters(local_adapters(adapters)),
        trust_remote_code=trust_remote_code,
        revision=revision,
        allow_unused=allow_unused or (),
    )
    _check_inputs(inputs, manifest)
    if is_folded:
        return VerifyResult(folder, files, None, (_FOLDED, *notes))
    progress.stage(f"verify ({verify}, on {provider})")
    exported = exported_of(folder, manifest, inputs, provider)
    try:
        parity = verify_checkpoint(exported, inputs, provider, verify, samples)
    except VerificationError as error:
        raise _of_a_published_folder(error) from error
    return VerifyResult(folder, files, figures_of(parity), (*parity.warnings, *notes))


def _check_fields(output: str | Path, manifest: Mapping[str, Any], *, compared: bool) -> None:
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


def _of_a_published_folder(error: VerificationError) -> VerificationError:
    """The error without the advice for an export: there is no rejected build to look at."""
    step = error.next_step
    if step is None or KEPT in step:
        step = "do not use the folder: export again"
    return type(error)(error.what, expected=error.expected, found=error.found, next_step=step)


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
    is_decoder, quantization = manifest["kind"] == "decoder", manifest["quantization"]
    companions = choose_companions(inputs.checkpoint.folder, inputs.adapters)
    fold = inputs.fold(torch.float32)
    return Exported(
        folder=folder,
        activations=manifest["activations"],
        accuracy_level=quantization and quantization.get("accuracy_level", 0),
        examples=None if is_decoder else random_inputs(fold.skeleton.model),
        tokenizer=companions.tokenizer_folder,
    )


def _check_files(folder: Path, manifest: Mapping[str, Any]) -> int:
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


def _other_files(folder: Path) -> tuple[str, ...]:
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


def _check_inputs(inputs: CheckpointInputs, manifest: Mapping[str, Any]) -> None:
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
            next_step="pass --adapter once for each, in their order",
        )


def _run_alone(folder: Path, manifest: Mapping[str, Any], provider: str) -> tuple[str, ...]:
    """Load a graph, and generate with a decoder's folder; returns what a person should know."""
    from bone_fx.verify.decoder.genai_folder import verify_generation
    from bone_fx.verify.graph import WrittenGraph
    from bone_fx.verify.parity import TOLERANCE, Parity

    for variant in manifest.get("variants", {}):
        open_session(folder / f"{variant}.onnx", provider)
    if manifest["kind"] == VARIANTS:
        if CONFIG_FILE in manifest["files"] and provider == "cpu":
            run_variants(folder, manifest["variants"])
        return (f"not compared with torch: {len(manifest['variants'])} graphs were run alone",)
    open_session(folder / MODEL_FILE, provider)
    notes = ["not compared with torch: pass --base, and --adapter for each adapter"]
    if manifest["kind"] == "decoder" and provider == "cpu":
        parity = Parity(TOLERANCE["fp32"])
        verify_generation(parity, WrittenGraph(folder / MODEL_FILE, provider))
        notes += [f"{case} not run: {reason}" for case, reason in parity.skipped.items()]
    return tuple(notes)
