"""`export`: from a base and adapters, or a module, to a verified folder for ONNX Runtime.

Stages: read the inputs, capture without weights, fold into recipes, translate, write into a staging
folder, verify, publish. All refusals that need no work come first; nothing is visible before it was
verified.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx, nn

from bone_fx.adapter_folder import AdapterFolder, read_adapters
from bone_fx.deploy.staging import MANIFEST, Staging, refuse_inputs_as_output, staged
from bone_fx.errors import UsageError
from bone_fx.progress import Progress, Silent
from bone_fx.verify.parity import Parity

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from bone_fx.deploy.builds import Build

DTYPES = ("fp32", "fp16", "bf16", "int4", "int8")
QUANTIZED = ("int4", "int8")
PARTS = ("keep", "int4", "int8")
BLOCK_SIZES = (16, 32, 64, 128, 256)
PROVIDERS = ("cpu", "cuda")
BLOCK_SIZE = 16
VERIFY = ("full", "fast", "off")


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
    adapters: Sequence[str | Path] = (),
    dtype: Literal["fp32", "fp16", "bf16", "int4", "int8"] = "fp32",
    provider: Literal["cpu", "cuda"] = "cpu",
    verify: Literal["full", "fast", "off"] = "full",
    verify_on: Literal["cpu", "cuda"] | None = None,
    overwrite: bool = False,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    block_size: int = BLOCK_SIZE,
    symmetric: bool = False,
    head: Literal["keep", "int4", "int8"] = "int8",
    embeddings: Literal["keep", "int4", "int8"] | None = None,
    last_token_logits: bool = False,
    calibration: str | Path | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> ExportResult:
    """Export to ONNX.

    Args:
        base: A Hugging Face folder, a GGUF file or a hub id; or a module, GraphModule or
            ExportedProgram of your own, which needs `example_inputs`.
        output: Folder to publish: `model.onnx`, one `model.onnx.data`, `bone_export.json`; for
            decoders also what onnxruntime-genai needs.
        adapters: Adapter folders in PEFT's layout, in the order in which they apply; only with a
            checkpoint.
        dtype: Dtype of weights and activations; `"int4"` and `"int8"` quantize the weights of
            products and compute in fp32 on the CPU, fp16 on CUDA. A module of your own keeps the
            dtype it has.
        provider: What the graph is written for.
        verify: `"full"` compares the written weights with torch's fold and runs the model three
            ways, `"fast"` does so for fewer of a decoder's cases, `"off"` publishes unverified and
            says so. All but `"off"` load the model in float32.
        verify_on: Provider to verify on, if not `provider`; recorded in the manifest.
        overwrite: Replace an earlier output, once the new one is verified.
        example_inputs: Arguments of one call of your own module, by position or name.
        dynamic_shapes: `torch.export`'s own for your module, instead of a dynamic batch.
        block_size: Values of a quantized weight that share a scale: 16, 32, 64, 128 or 256.
        symmetric: Quantize without zero points.
        head: What a quantized decoder's head becomes.
        embeddings: What a quantized model's embeddings become; None keeps them, unless one is tied
            to a quantized head, which then serves both.
        last_token_logits: Give a decoder's logits of each text's last token only, as a generation
            loop reads them: prefill without a product over the vocabulary for every token.
        calibration: A text file. int4 counts the errors of a decoder's weights by the inputs that
            their products see on its first thousand tokens; None takes the built-in text,
            `"none"` rounds to nearest, as ONNX Runtime's quantizer and the builder do.
        trust_remote_code: Run Python files that come with the base.
        revision: Branch, tag or commit of a hub id.
        progress: Told about stages and bytes.

    Raises:
        BoneFxError: One of its kinds, each with its exit status; nothing is published, the inputs
            are as they were.
    """
    _check_choices(dtype=(dtype, DTYPES), provider=(provider, PROVIDERS), verify=(verify, VERIFY))
    if block_size not in BLOCK_SIZES:
        raise UsageError(
            f"block_size={block_size} is not known",
            expected=" or ".join(map(str, BLOCK_SIZES)),
            found=str(block_size),
        )
    _check_choices(head=(head, PARTS), embeddings=(embeddings or "keep", PARTS))
    if dtype not in QUANTIZED:
        _refuse_quantization(dtype, block_size, symmetric, head, embeddings)
    _check_calibration(calibration, dtype)
    target = verify_on or provider
    _check_choices(verify_on=(target, PROVIDERS))
    told = progress or Silent()
    own = not isinstance(base, str | Path)
    if own and example_inputs is None and not _is_program(base):
        raise UsageError(
            "a module of your own needs example_inputs", next_step="pass the arguments of one call"
        )
    if own and dtype in QUANTIZED:
        raise UsageError(
            f"dtype={dtype!r} goes with a checkpoint", next_step="export the module as it is"
        )
    if own and last_token_logits:
        raise UsageError(
            "last_token_logits goes with a checkpoint",
            next_step="cut the logits in your module's forward",
        )
    if own and adapters:
        raise UsageError(
            "adapters go with a checkpoint",
            next_step="adapt the module, train it and export its fold()",
        )
    refuse_inputs_as_output(output, [*adapters, *([] if own else [str(base)])])
    with staged(output, overwrite=overwrite) as staging:
        told.stage("read the inputs")
        folders = read_adapters(adapters)
        if verify != "off":
            from bone_fx.runtime.session import require_provider

            require_provider(target)
        build: Build
        if isinstance(base, str | Path):
            from bone_fx.deploy.builds import BuildOptions, build_checkpoint

            options = BuildOptions(
                dtype,
                provider,
                trust_remote_code,
                revision,
                block_size,
                symmetric,
                head,
                embeddings,
                last_token_logits,
                calibration,
            )
            build = build_checkpoint(base, folders, options, told)
        else:
            from bone_fx.deploy.builds import build_module

            build = build_module(base, example_inputs, dynamic_shapes, provider, told)
        return _finish(staging, build, folders, provider, verify, target, told)


def _finish(
    staging: Staging,
    build: Build,
    adapters: list[tuple[str, AdapterFolder]],
    provider: str,
    verify: str,
    target: str,
    told: Progress,
) -> ExportResult:
    from bone_fx.deploy.manifest import manifest_of, write_manifest

    told.stage("write the model")
    build.write(staging.folder, told)
    parity: Parity | None = None
    if verify != "off":
        told.stage(f"verify ({verify}, on {target})")
        parity = build.verify(staging.folder, target, verify)
    told.stage("publish")
    content = manifest_of(build, adapters, provider, verify, target, parity, staging.folder)
    write_manifest(staging.folder / MANIFEST, content)
    staging.publish()
    warnings = [
        *build.notes,
        *(parity.warnings if parity else ["not verified: published with verify='off'"]),
    ]
    return ExportResult(staging.output, parity is not None, content, tuple(warnings))


def _check_calibration(calibration: str | Path | None, dtype: str) -> None:
    if calibration is None or calibration == "none":
        return
    if dtype != "int4":
        raise UsageError(
            f"calibration is for int4, and dtype is {dtype!r}", next_step="export without it"
        )
    if not Path(calibration).expanduser().is_file():
        raise UsageError(
            f"calibration={str(calibration)!r} is no file",
            expected="a text file, or none",
            next_step="name a file, or leave it out for the built-in text",
        )


def _refuse_quantization(
    dtype: str, block_size: int, symmetric: bool, head: str, embeddings: str | None
) -> None:
    """Refuse choices that only a quantized export has."""
    defaults = inspect.signature(export).parameters
    given = {
        "block_size": block_size,
        "symmetric": symmetric,
        "head": head,
        "embeddings": embeddings,
    }
    chosen = [name for name, value in given.items() if value != defaults[name].default]
    if chosen:
        raise UsageError(
            f"{', '.join(chosen)} goes with a quantized export, and dtype is {dtype!r}",
            expected="dtype " + " or ".join(QUANTIZED),
            next_step="leave it out, or choose such a dtype",
        )


def _is_program(base: object) -> bool:
    return isinstance(base, torch.export.ExportedProgram)


def _check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UsageError(
                f"{name}={value!r} is not known", expected=" or ".join(allowed), found=repr(value)
            )
