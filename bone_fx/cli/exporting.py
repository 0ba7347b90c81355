"""The commands that publish a folder: `export` and `fold`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bone_fx.cli.adapters import named_adapters, named_variants
from bone_fx.cli.settings import (
    ADAPTER,
    AllowUnused,
    AsJson,
    Base,
    Debug,
    Output,
    Overwrite,
    Quiet,
    RemoteCode,
    Revision,
    Samples,
    option,
)
from bone_fx.cli.summary import export_lines, fold_lines
from bone_fx.cli.terminal import answer, answer_json, note
from bone_fx.cli.watching import progress_of
from bone_fx.deploy.options import (
    DTYPE,
    FLOAT_CACHE,
    FORM_SAID,
    HEAD,
    Dtype,
    ExportOptions,
    KvCache,
    Part,
    Provider,
    Verify,
)

if TYPE_CHECKING:
    from bone_fx.deploy.export import ExportResult
    from bone_fx.deploy.fold_checkpoint import FoldResult

VARIANT = typer.Option(
    "--variant",
    metavar="NAME=DIR",
    help="Instead of --adapter: an adapter that gets a graph of its own, NAME.onnx, over common "
    "weights; repeat for several.",
)


def export(
    context: typer.Context,
    base: Base,
    output: Output,
    adapter: Annotated[list[str] | None, ADAPTER] = None,
    variant: Annotated[list[str] | None, VARIANT] = None,
    dtype: Annotated[Dtype | None, option("dtype", show_default=DTYPE)] = None,
    provider: Annotated[Provider, option("provider")] = "cpu",
    verify: Annotated[Verify, option("verify")] = "full",
    verify_on: Annotated[Provider | None, option("verify_on")] = None,
    samples: Samples = None,
    overwrite: Overwrite = False,
    block_size: Annotated[
        int | None, option("block_size", show_default=FORM_SAID["block_size"])
    ] = None,
    symmetric: Annotated[
        bool | None,
        option("symmetric", "--symmetric/--asymmetric", show_default=FORM_SAID["symmetric"]),
    ] = None,
    head: Annotated[Part | None, option("head", show_default=HEAD)] = None,
    embeddings: Annotated[Part | None, option("embeddings")] = None,
    kv_cache: Annotated[KvCache, option("kv_cache")] = FLOAT_CACHE,
    last_token_logits: Annotated[bool, option("last_token_logits", "--last-token-logits")] = False,
    cuda_graph: Annotated[
        bool | None, option("cuda_graph", "--cuda-graph/--no-cuda-graph", show_default="no")
    ] = None,
    calibration: Annotated[str | None, option("calibration", metavar="FILE")] = None,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fold adapters into a base model and export it to ONNX, verified, for ONNX Runtime."""
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
    )
    adapters, variants = named_adapters(adapter or []), named_variants(variant or [])
    from bone_fx.deploy.export import export_with

    with progress_of(context, quiet=quiet) as progress:
        result = export_with(base, adapters, output, options, progress, variants)
    _report(result, export_lines(result.output, result.manifest), as_json=as_json)


def fold(
    context: typer.Context,
    base: Base,
    adapter: Annotated[list[str], ADAPTER],
    output: Output,
    overwrite: Overwrite = False,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fold adapters into a checkpoint: a Hugging Face folder of the same layout."""
    adapters = named_adapters(adapter)
    from bone_fx.deploy.fold_checkpoint import fold_checkpoint

    with progress_of(context, quiet=quiet) as progress:
        result = fold_checkpoint(
            base,
            adapters=adapters,
            output=output,
            overwrite=overwrite,
            revision=revision,
            allow_unused=allow_unused,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _report(result, fold_lines(result.output, result.manifest), as_json=as_json)


def _report(result: ExportResult | FoldResult, lines: list[str], *, as_json: bool) -> None:
    """Notes on stderr; on stdout the result in words, or everything as JSON."""
    for warning in result.warnings:
        note(warning)
    if as_json:
        content = {"output": str(result.output), "warnings": result.warnings, **result.manifest}
        answer_json(content)
    else:
        for line in lines:
            answer(line)
