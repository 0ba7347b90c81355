"""`export`: from a base and adapters, or a module, to a verified folder for ONNX Runtime.

1. The choices are checked (`deploy.options`), then whether they go with the kind of base and
   whether the output overlaps an input: refusals that need no work come first.
2. A staging folder is made beside the output (`deploy.staging.staged`).
3. The adapters are read (`adapter_folder.read_adapters`), and the provider that verification needs
   is looked for (`runtime.session.require_provider`).
4. The build is made. A module of the user's own is captured with its weights
   (`deploy.builds.module.build_module`). A checkpoint (`deploy.builds.checkpoint.build_checkpoint`)

   a. is opened, and the adapters choose its class (`deploy.checkpoint_inputs.open_checkpoint`);
   b. becomes a model without weights and recipes with the adapters folded in
      (`CheckpointInputs.fold`);
   c. is captured and translated to ONNX (`deploy.builds.checkpoint_graph.capture_graph`);
   d. is quantized, if asked (`deploy.builds.quantization.quantize`), and for CUDA each node is
      placed (`deploy.builds.base.cuda_placement`).

5. The model is written, recipe by recipe, and what stands beside it (`Build.write`).
6. What was written is compared with torch (`Build.verify`).
7. The manifest, a model card and a page are written (`deploy.manifest.export_manifest`,
   `deploy.report.write_reports`) and the folder is moved to the output (`Staging.publish`).
   Nothing is visible before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from bone_fx.adapter_folder import Adapters, read_adapters
from bone_fx.deploy.input_files import files_read, local_adapters
from bone_fx.deploy.options import (
    FLOAT_CACHE,
    NO_CALIBRATION,
    Dtype,
    ExportOptions,
    KvCache,
    Part,
    Provider,
    Verify,
)
from bone_fx.deploy.report import write_failure, write_reports
from bone_fx.deploy.report.timing import Timed
from bone_fx.deploy.staging import staged
from bone_fx.errors import UsageError, VerificationError
from bone_fx.progress import PUBLISH, Progress, shown
from bone_fx.verify.parity import Parity

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from bone_fx.deploy.builds import Build

UNVERIFIED = "not verified: published with verify='off'"


@dataclass(frozen=True)
class ExportResult:
    """What an export published.

    Attributes:
        output: The folder.
        verified: Whether it was compared with torch; False only with `verify="off"`.
        manifest: The content of `bone_export.json`.
        warnings: What a person should know.
    """

    output: Path
    verified: bool
    manifest: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...] = ()


def export(
    base: str | Path | nn.Module | fx.GraphModule | ExportedProgram,
    *,
    output: str | Path,
    adapters: Sequence[str | Path] | Mapping[str, str | Path] = (),
    variants: Mapping[str, str | Path] | None = None,
    dtype: Dtype | None = None,
    provider: Provider = "cpu",
    verify: Verify = "full",
    verify_on: Provider | None = None,
    samples: str | Path | None = None,
    overwrite: bool = False,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    block_size: int | None = None,
    symmetric: bool | None = None,
    head: Part | None = None,
    embeddings: Part | None = None,
    kv_cache: KvCache = "float",
    last_token_logits: bool = False,
    cuda_graph: bool | None = None,
    calibration: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    allow_unused: Sequence[str] | None = None,
    progress: Progress | bool = True,
) -> ExportResult:
    """Export to ONNX.

    Args:
        base: A Hugging Face folder, a GGUF file or a hub id; or a module, GraphModule or
            ExportedProgram of your own, which needs `example_inputs`.
        output: Folder to publish: `model.onnx`, one `model.onnx.data`, `bone_export.json`,
            `report.html`, `README.md`; for decoders also what onnxruntime-genai needs.
        adapters: Adapter folders in PEFT's layout or hub ids (`owner/name`,
            `owner/name@revision`), in the order in which they apply; or name -> folder, to name
            them in the manifest. Only with a checkpoint.
        variants: Name -> adapter folder, instead of `adapters`: each is folded into a graph of its
            own, `NAME.onnx`, and all lie in one folder over one `model.onnx.data`, in which what no
            adapter touches stands once.
        dtype: Dtype of weights and activations, `"fp32"` by default; `"int4"` and `"int8"` quantize
            the weights of products and compute in fp32 on the CPU, fp16 on CUDA. A module of your
            own keeps the dtype it has.
        provider: What the graph is written for.
        verify: `"full"` compares the written weights with torch's fold and runs the model three
            ways, `"fast"` does so for fewer of a decoder's cases, `"off"` publishes unverified and
            says so. All but `"off"` load the model in float32.
        verify_on: Provider to verify on, if not `provider`; recorded in the manifest.
        samples: A text file, of which the first two thousand tokens are run: a decoder's negative
            log-likelihood a token, in nats, under base, adapter and export is in the manifest.
        overwrite: Replace an earlier output, once the new one is verified.
        example_inputs: Arguments of one call of your own module, by position or name; their values
            do not matter. Dimension 0 of the first tensor, and of all that agree with it, becomes
            dynamic; of a transformers model the lengths too.
        dynamic_shapes: `torch.export`'s own for your module, instead of a dynamic batch.
        block_size: Values of a quantized weight that share a scale: 16, 32, 64, 128 or 256. The
            default is 16 for `"cpu"` and 32 for `"cuda"`.
        symmetric: Quantize without zero points. By default with them for `"cpu"`, and without for
            `"cuda"`, whose fast kernels take no others.
        head: What a quantized decoder's head becomes, `"int8"` by default.
        embeddings: What a quantized model's embeddings become; None keeps them, unless one is tied
            to a quantized head, which then serves both.
        kv_cache: `"int8"` keeps a decoder's keys and values in int8 between its steps, a quarter of
            fp32's bytes, by scales of each layer and channel that are measured on the calibration
            text; `"fp8"` the same in float8_e4m3fn, for provider `"cuda"` alone, verified through
            a twin with a cache of rounded floats; `"float"` keeps them in the dtype of the
            activations. Only where every layer's attention is GroupQueryAttention.
        last_token_logits: Give a decoder's logits of each text's last token only, as a generation
            loop reads them: prefill without a product over the vocabulary for every token.
        cuda_graph: Let onnxruntime-genai capture a decoder's step as a CUDA graph and replay it,
            which saves the launches of its kernels. Off by default; it takes one beam, and the
            cache has `max_length` positions from the start.
        calibration: A text file. int4 chooses a decoder's scales for the inputs that its products
            see on its first thousand tokens, and a cache in 8 bits is measured there; None takes
            the built-in text, `"none"` rounds weights to nearest, as ONNX Runtime's quantizer and
            the builder do.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
        allow_unused: Names, or patterns as for file names, of tensors in the base's or an adapter's
            files that may be left out though the model does not take them; the manifest notes them.
        progress: Tell stages and bytes on stderr, with a bar on a terminal; or what is to be told
            instead, an object with `stage(name)` and `advance(done, total)`.

    Raises:
        BoneFxError: One of its kinds, each with its exit status; nothing is published, the inputs
            are as they were.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2))
        >>> with TemporaryDirectory() as folder:
        ...     model.save_pretrained(f"{folder}/base")
        ...     result = export(f"{folder}/base", output=f"{folder}/out")
        >>> result.verified, result.manifest["operators"]["com.microsoft::GroupQueryAttention"]
        (True, 1)
    """
    options = ExportOptions(
        dtype=dtype,
        provider=provider,
        verify=verify,
        verify_on=verify_on,
        samples=samples,
        overwrite=overwrite,
        block_size=block_size,
        symmetric=symmetric,
        head=head,
        embeddings=embeddings,
        kv_cache=kv_cache,
        last_token_logits=last_token_logits,
        cuda_graph=cuda_graph,
        calibration=calibration,
        revision=revision,
        allow_unused=allow_unused,
        trust_remote_code=trust_remote_code,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
    )
    with shown(progress) as told:
        return export_with(base, adapters, output, options, told, variants or {})


def export_with(
    base: str | Path | nn.Module | ExportedProgram,
    adapters: Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    options: ExportOptions,
    progress: Progress,
    variants: Mapping[str, str | Path] | None = None,
) -> ExportResult:
    """Export to ONNX as the options say; `export` tells what the arguments are."""
    if not isinstance(base, str | Path):
        _check_module_choices(base, [*adapters, *(variants or ())], options)
    if variants:
        _check_variants(adapters, variants)
    adapters, variants = local_adapters(adapters), local_adapters(variants or {})
    text = None if options.calibration == NO_CALIBRATION else options.calibration
    every = [*adapters.values(), *variants.values()]
    inputs = files_read(base, every, [text, options.samples])
    with staged(output, overwrite=options.overwrite, inputs=inputs) as staging:
        timed = Timed(progress)
        if variants:
            manifest = _write_variants(staging.folder, base, variants, options, timed)
        else:
            manifest = _write(staging.folder, base, adapters, options, timed)
        timed.stage(PUBLISH)
        manifest = write_reports(staging.folder, manifest, timed)
        staging.publish(manifest)
    verification = manifest["verification"]
    notes = [*manifest["notes"], *(verification["warnings"] if verification else [UNVERIFIED])]
    return ExportResult(staging.output, verification is not None, manifest, tuple(notes))


def _write(
    folder: Path,
    base: object,
    adapters: Mapping[str, Path],
    options: ExportOptions,
    timed: Timed,
) -> dict[str, Any]:
    """Build, write and verify in a folder; the manifest of what is there.

    Raises:
        VerificationError: It is not what torch computes; a page that says so is in the folder.
    """
    from bone_fx.deploy.manifest import export_manifest

    timed.stage("read the inputs")
    folders = read_adapters(adapters)
    if options.verify != "off":
        from bone_fx.runtime.session import require_provider

        require_provider(options.verification_provider)
    build = _build(base, folders, options, timed)
    timed.stage("write the model")
    written = build.write(folder, timed)

    def manifest_with(parity: Parity | None) -> dict[str, Any]:
        return export_manifest(
            build, written, parity, adapters=folders, options=options, folder=folder
        )

    try:
        parity = _verify(build, folder, options, timed)
    except VerificationError as error:
        write_failure(folder, manifest_with(None), timed, str(error))
        raise
    return manifest_with(parity)


def _write_variants(
    folder: Path,
    base: object,
    variants: Mapping[str, Path],
    options: ExportOptions,
    timed: Timed,
) -> dict[str, Any]:
    """The same for each variant, in one folder in the end."""
    from bone_fx.deploy.variants import Folder

    whole = Folder(folder)
    for name, adapter in variants.items():
        timed.stage(f"variant {name}")
        place = whole.begin(name)
        try:
            manifest = _write(place, base, {"default": adapter}, options, timed)
        except VerificationError as error:
            raise VerificationError(
                f"variant {name}: {error.what}",
                expected=error.expected,
                found=error.found,
                next_step=error.next_step,
            ) from error
        write_reports(place, manifest, timed)
        whole.take(name, manifest)
    return whole.finish()


def _check_variants(adapters: Collection[str | Path], variants: Collection[str]) -> None:
    from bone_fx.deploy.variants import check_names

    if adapters:
        raise UsageError(
            "variants have an adapter each, and adapters apply one after another to one graph",
            next_step="pass one or the other",
        )
    check_names(list(variants))


def _build(base: object, adapters: Adapters, options: ExportOptions, progress: Progress) -> Build:
    from bone_fx.deploy.builds import build_checkpoint, build_module

    if isinstance(base, str | Path):
        return build_checkpoint(base, adapters, options, progress)
    return build_module(base, options, progress)


def _verify(
    build: Build, folder: Path, options: ExportOptions, progress: Progress
) -> Parity | None:
    if options.verify == "off":
        return None
    provider = options.verification_provider
    progress.stage(f"verify ({options.verify}, on {provider})")
    return build.verify(folder, provider, options.verify, options.samples)


def _check_module_choices(
    base: object, adapters: Collection[str | Path], options: ExportOptions
) -> None:
    """Refuse what goes with a checkpoint only, for a module of the user's own."""
    if options.example_inputs is None and not isinstance(base, torch.export.ExportedProgram):
        raise UsageError(
            "a module of your own needs example_inputs", next_step="pass the arguments of one call"
        )
    if options.dtype is not None:
        raise UsageError(
            f"dtype={options.dtype!r} goes with a checkpoint",
            next_step="export the module as it is",
        )
    if options.last_token_logits:
        raise UsageError(
            "last_token_logits goes with a checkpoint",
            next_step="cut the logits in your module's forward",
        )
    if options.kv_cache != FLOAT_CACHE:
        raise UsageError("kv_cache goes with a checkpoint", next_step="leave it out")
    if adapters:
        raise UsageError(
            "adapters go with a checkpoint",
            next_step="adapt the module, train it and export its fold()",
        )
    for name in ("calibration", "cuda_graph", "samples", "revision", "allow_unused"):
        if getattr(options, name):
            raise UsageError(f"{name} goes with a checkpoint", next_step="leave it out")
