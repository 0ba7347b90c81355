"""`bone-export`: flags to the options of one export, its errors to exit codes."""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bone_fx.deploy.options import (
    BLOCK_SIZE,
    DTYPE,
    HEAD,
    HELP,
    Dtype,
    ExportOptions,
    Part,
    Provider,
    Verify,
)
from bone_fx.errors import BoneFxError
from bone_fx.progress import Lines, Progress, Silent

if TYPE_CHECKING:
    from bone_fx.deploy.export import ExportResult
    from bone_fx.deploy.fold_checkpoint import FoldResult

INTERRUPTED = 130
INTERNAL = 1
_INTERRUPTION = "interrupted; nothing was published"

# typer >= 0.29 carries its own click and exports of its errors only this subclass of the usage
# error.
_WRONG_USAGE = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])

EPILOG = """\b
Examples:
  bone-export ./SmolLM2-135M-Instruct --adapter ./my-adapter -o ./out
  bone-export ./base --adapter ./style --adapter ./facts -o ./out --dtype fp16
  bone-export model.gguf -o ./out --json
  bone-export fold ./base --adapter ./my-adapter -o ./folded   (a checkpoint, no ONNX)

\b
Exit codes: 0 ok, 2 usage, 3 input refused, 4 fold failed, 5 export failed, 6 verification failed,
7 provider not to be had, 130 interrupted. Nothing is published unless the code is 0.
"""


FOLD_EPILOG = """\b
Examples:
  bone-export fold ./base --adapter ./my-adapter -o ./folded
  bone-export fold ./base --adapter ./style --adapter ./facts -o ./folded --json

Exit codes as for bone-export.
"""


def _option(choice: str, *flags: str, **settings: Any) -> Any:
    """An option of one of `ExportOptions`' choices, with its sentence."""
    return typer.Option(*flags, help=HELP[choice], **settings)


Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Hugging Face folder, GGUF file or hub id.")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to publish.")]
ADAPTER = typer.Option(
    "--adapter",
    metavar="DIR",
    help="Bone, BAT or MiSS adapter in PEFT's layout; repeat to apply several, in order.",
)
Overwrite = Annotated[bool, _option("overwrite", "--overwrite")]
Revision = Annotated[str | None, _option("revision")]
AllowUnused = Annotated[list[str] | None, _option("allow_unused", "--allow-unused", metavar="NAME")]
RemoteCode = Annotated[bool, _option("trust_remote_code", "--trust-remote-code")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]

_SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
_HELP_FLAGS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(**_SETTINGS)
fold_app = typer.Typer(**_SETTINGS)


@app.command(epilog=EPILOG, context_settings=_HELP_FLAGS)
def bone_export(
    base: Base,
    output: Output,
    adapter: Annotated[list[str] | None, ADAPTER] = None,
    dtype: Annotated[Dtype | None, _option("dtype", show_default=DTYPE)] = None,
    provider: Annotated[Provider, _option("provider")] = "cpu",
    verify: Annotated[Verify, _option("verify")] = "full",
    verify_on: Annotated[Provider | None, _option("verify_on")] = None,
    overwrite: Overwrite = False,
    block_size: Annotated[int | None, _option("block_size", show_default=str(BLOCK_SIZE))] = None,
    symmetric: Annotated[
        bool | None,
        _option("symmetric", "--symmetric/--asymmetric", show_default="asymmetric"),
    ] = None,
    head: Annotated[Part | None, _option("head", show_default=HEAD)] = None,
    embeddings: Annotated[Part | None, _option("embeddings")] = None,
    last_token_logits: Annotated[bool, _option("last_token_logits", "--last-token-logits")] = False,
    calibration: Annotated[str | None, _option("calibration", metavar="FILE")] = None,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fold block adapters into a base model and export it to ONNX, verified, for ONNX Runtime."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    options = ExportOptions(
        dtype=dtype,
        provider=provider,
        verify=verify,
        verify_on=verify_on,
        overwrite=overwrite,
        block_size=block_size,
        symmetric=symmetric,
        head=head,
        embeddings=embeddings,
        last_token_logits=last_token_logits,
        calibration=calibration,
        revision=revision,
        allow_unused=allow_unused,
        trust_remote_code=trust_remote_code,
    )
    from bone_fx.deploy.export import export_with

    with _progress(quiet=quiet) as progress:
        result = export_with(base, adapter or (), output, options, progress)
    verification = result.manifest["verification"]
    figures = (
        "not verified"
        if verification is None
        else ", ".join(f"{k} {v:.2g}" for k, v in verification["figures"].items())
    )
    _report(result, figures, as_json=as_json)


@fold_app.command(epilog=FOLD_EPILOG, context_settings=_HELP_FLAGS)
def bone_export_fold(
    base: Base,
    adapter: Annotated[list[str], ADAPTER],
    output: Output,
    overwrite: Overwrite = False,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fold block adapters into a checkpoint: a Hugging Face folder of the same layout."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bone_fx.deploy.fold_checkpoint import fold_checkpoint

    with _progress(quiet=quiet) as progress:
        result = fold_checkpoint(
            base,
            adapters=adapter,
            output=output,
            overwrite=overwrite,
            revision=revision,
            allow_unused=allow_unused,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    _report(result, f"{len(result.folded)} weights folded and read back", as_json=as_json)


def _progress(*, quiet: bool) -> AbstractContextManager[Progress]:
    return nullcontext(Silent()) if quiet else Lines()


def _report(result: ExportResult | FoldResult, summary: str, *, as_json: bool) -> None:
    """Notes on stderr; on stdout the summary in a line, or everything as JSON."""
    for warning in result.warnings:
        typer.echo(f"note: {warning}", err=True)
    content = {"output": str(result.output), "warnings": result.warnings, **result.manifest}
    typer.echo(json.dumps(content) if as_json else f"{result.output}: {summary}")


def main() -> None:
    """Run `bone-export` with the arguments of the process, and raise SystemExit.

    A first argument `fold` is the command; a base of that name is `./fold`.
    """
    as_json = "--json" in sys.argv
    folds = sys.argv[1:2] == ["fold"]
    # The process lives for one command: collecting garbage among the graphs takes an eighth of it.
    gc.disable()
    try:
        # typer answers Ctrl-C with this status as its return value; the command itself returns
        # None.
        if folds:
            code = fold_app(sys.argv[2:], standalone_mode=False, prog_name="bone-export fold") or 0
        else:
            code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:
            code = _fail(_INTERRUPTION, INTERRUPTED, "Interrupted", as_json=as_json)
    except BoneFxError as error:
        code = _fail(str(error), error.exit_code, type(error).__name__, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail(_INTERRUPTION, INTERRUPTED, "Interrupted", as_json=as_json)
    except _WRONG_USAGE as error:
        help_of = "bone-export fold --help" if folds else "bone-export --help"
        message = f"{error.format_message()}\n  next:     {help_of}"
        code = _fail(message, 2, "UsageError", as_json=as_json)
    except MemoryError:
        code = _fail(
            "out of memory; nothing was published", INTERNAL, "MemoryError", as_json=as_json
        )
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def program() -> None:
    """The process of `bone-export`: `main`, and an exit that does not take graphs apart first."""
    try:
        main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    os._exit(code)


def _fail(message: str, code: int, kind: str, *, as_json: bool) -> int:
    if as_json:
        sys.stdout.write(json.dumps({"error": kind, "exit_code": code, "message": message}) + "\n")
    red, plain = ("\x1b[31m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
    sys.stderr.write(f"{red}error:{plain} {message}\n")
    return code
