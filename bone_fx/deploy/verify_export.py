"""`verify_export`: a published folder, verified again later or on another machine.

1. The manifest is read, and every file that it lists is hashed; files that it does not list are
   named.
2. Without the base there is nothing to compare with: the graph is loaded, and onnxruntime-genai
   generates with a decoder's folder. Of a folder with variants, every graph is loaded.
3. With it, the base's and the adapters' files must be those of the manifest, and the verification
   of the export is run again (`deploy.verification.verify_checkpoint`), of every variant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from bone_fx.adapter_folder import Adapters, read_adapters
from bone_fx.deploy.builds.checkpoint_graph import random_inputs
from bone_fx.deploy.checkpoint_inputs import CheckpointInputs, open_checkpoint
from bone_fx.deploy.companions.choice import choose_companions
from bone_fx.deploy.earlier_output import MANIFEST, REJECTED, read_manifest
from bone_fx.deploy.input_files import local_adapter, local_adapters
from bone_fx.deploy.manifest import figures_of
from bone_fx.deploy.options import FP8_CACHE, Compared, Provider, check_samples
from bone_fx.deploy.published.alone import run_alone
from bone_fx.deploy.published.checks import check_fields, check_files, check_inputs, other_files
from bone_fx.deploy.published.variants import adapters_of_variants, of_variant
from bone_fx.deploy.variants import KIND as VARIANTS
from bone_fx.deploy.variants import together
from bone_fx.deploy.verification import Exported, verify_checkpoint
from bone_fx.errors import KEPT, UsageError, VerificationError
from bone_fx.files.nearby import meant
from bone_fx.onnx.writer import MODEL_FILE
from bone_fx.progress import Progress, telling
from bone_fx.runtime.session import require_provider

_FOLDED = "a folded checkpoint: its files were hashed; only ONNX outputs are compared with a base"


@dataclass(frozen=True)
class VerifyResult:
    """What a verification of a published folder found.

    Attributes:
        output: The folder.
        files: How many files are as the manifest says.
        verification: Figures and cases of the comparison with torch; None without the base. Of a
            folder of variants the worst of all, and each one's own under `variants`.
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
    variants: Mapping[str, str | Path] | None = None,
    provider: Provider = "cpu",
    verify: Compared = "full",
    samples: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_unused: Sequence[str] | None = None,
    progress: Progress | bool = True,
) -> VerifyResult:
    """Verify a published folder again; nothing is written.

    Args:
        output: The folder, with its `bone_export.json`.
        base: The base that it was made from; None compares the files and runs the graph only.
        adapters: The adapters, folders or hub ids, in the order in which they applied. Of a folder
            of variants, one of each, which its files tell.
        variants: Instead, of a folder of variants: each one's adapter by its name.
        provider: ONNX Runtime's provider to run on.
        verify: `"full"` or `"fast"`.
        samples: A text whose likelihood is measured, as for `export`.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
        allow_unused: Tensors that may be left out, as for `export`.
        progress: Tell stages on stderr; or what is to be told instead, an object with
            `stage(name)` and `advance(done, total)`.

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
    progress = telling(progress)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UsageError(
            f"{output} is no output of an export or a fold",
            expected=f"a folder with {MANIFEST}",
            next_step=meant(output, "give the folder that was passed to -o"),
        )
    for name, given in (("adapters", adapters), ("variants", variants), ("samples", samples)):
        if given and base is None:
            raise UsageError(f"{name} go with their base", next_step="pass --base too")
    if verify not in get_args(Compared):
        raise UsageError(f"verify={verify!r} compares nothing", next_step="pass full or fast")
    check_samples(samples, verify)
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
    check_fields(output, manifest, compared=base is not None)
    if variants and manifest["kind"] != VARIANTS:
        raise UsageError(f"{output} holds no variants", next_step="pass --adapter instead")
    cache = manifest.get("kv_cache") or {}
    if cache.get("dtype") == FP8_CACHE and provider != "cpu" and base is not None:
        raise UsageError(
            "a decoder with a cache in fp8 is compared through a twin on the CPU",
            next_step="--provider cpu, and tools/gpu_check.py on the card",
        )
    is_folded = manifest["kind"] == "checkpoint"
    progress.stage("hash the files")
    files = check_files(folder, manifest)
    notes = other_files(folder)
    if not is_folded:
        require_provider(provider)
    if base is None:
        if is_folded:
            return VerifyResult(folder, files, None, (_FOLDED, *notes))
        progress.stage(f"run the graph on {provider}")
        try:
            alone = run_alone(folder, manifest, provider)
        except VerificationError as error:
            raise _of_a_published_folder(error) from error
        return VerifyResult(folder, files, None, (*alone, *notes))

    def compared(adapters: Adapters, variant: str | None = None) -> dict[str, Any] | None:
        said = manifest if variant is None else of_variant(manifest, variant)
        progress.stage("read the inputs")
        inputs = open_checkpoint(
            base,
            adapters,
            trust_remote_code=trust_remote_code,
            revision=revision,
            allow_unused=allow_unused or (),
        )
        check_inputs(inputs, said)
        if is_folded:
            return None
        progress.stage(f"verify {variant or ''} ({verify}, on {provider})".replace("  ", " "))
        exported = exported_of(folder, said, inputs, provider, variant)
        return figures_of(verify_checkpoint(exported, inputs, provider, verify, samples))

    if manifest["kind"] != VARIANTS:
        try:
            figures = compared(read_adapters(local_adapters(adapters)))
        except VerificationError as error:
            raise _of_a_published_folder(error) from error
    else:
        found = {}
        named = {name: local_adapter(each) for name, each in (variants or {}).items()}
        every = adapters_of_variants(manifest, local_adapters(adapters), named)
        for name, adapter in every.items():
            try:
                found[name] = compared(read_adapters([adapter]), name)
            except VerificationError as error:
                raise _of_a_published_folder(error, f"variant {name}: ") from error
        figures = {**(together(list(found.values())) or {}), "variants": found}
    if figures is None:
        return VerifyResult(folder, files, None, (_FOLDED, *notes))
    return VerifyResult(folder, files, figures, (*figures["warnings"], *notes))


def _of_a_published_folder(error: VerificationError, of: str = "") -> VerificationError:
    """The error without the advice for an export: there is no rejected build to look at."""
    step = error.next_step
    if step is None or KEPT in step:
        step = "do not use the folder: export again"
    return type(error)(of + error.what, expected=error.expected, found=error.found, next_step=step)


def exported_of(
    folder: Path,
    manifest: Mapping[str, Any],
    inputs: CheckpointInputs,
    provider: str,
    variant: str | None = None,
) -> Exported:
    """A published folder, or a variant in it, as verification meets it.

    Raises:
        UsageError: The provider has no kernels for its dtype.
    """
    if manifest["activations"] == "bf16" and provider == "cpu":
        raise UsageError(
            "ONNX Runtime does not load a bf16 model on the CPU provider",
            next_step="leave out --base: it was compared when it was exported, through a twin"
            if (manifest.get("kv_cache") or {}).get("dtype") == FP8_CACHE
            else "--provider cuda",
        )
    is_decoder, quantization = manifest["kind"] == "decoder", manifest["quantization"]
    companions = choose_companions(inputs.checkpoint.folder, inputs.adapters)
    fold = inputs.fold(torch.float32)
    return Exported(
        path=folder / (MODEL_FILE if variant is None else f"{variant}.onnx"),
        activations=manifest["activations"],
        accuracy_level=quantization and quantization.get("accuracy_level", 0),
        examples=None if is_decoder else random_inputs(fold.skeleton.model),
        tokenizer=companions.tokenizer_folder,
        opened=None if variant is None else f"{next(iter(manifest['variants']))}.onnx",
    )
