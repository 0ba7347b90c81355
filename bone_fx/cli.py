"""`bone-export`: flags to one call of `bone_fx.export`, its errors to exit codes."""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Annotated, cast

import typer

from bone_fx.errors import BoneFxError

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


class Dtype(StrEnum):
    """Dtypes of an exported model."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int4 = "int4"
    int8 = "int8"


class Part(StrEnum):
    """What the head or the embeddings of a quantized model become."""

    keep = "keep"
    int4 = "int4"
    int8 = "int8"


class Provider(StrEnum):
    """Execution providers that a graph is written for."""

    cpu = "cpu"
    cuda = "cuda"


class Verify(StrEnum):
    """How much is compared before an export is published."""

    full = "full"
    fast = "fast"
    off = "off"


app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def bone_export(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Hugging Face folder, GGUF file or hub id.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to publish.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="Bone, BAT or MiSS adapter in PEFT's layout; repeat to apply several, in order.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Dtype of weights and activations; int4, int8: of weights.")
    ] = Dtype.fp32,
    provider: Annotated[
        Provider, typer.Option(help="Provider that the graph is written for.")
    ] = Provider.cpu,
    verify: Annotated[
        Verify, typer.Option(help="Compare with torch before publishing.")
    ] = Verify.full,
    verify_on: Annotated[
        Provider | None, typer.Option(help="Verify on another provider than --provider.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.")
    ] = False,
    block_size: Annotated[
        int, typer.Option(help="int4, int8: values of a weight that share a scale.")
    ] = 16,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="int4, int8: no zero points.")
    ] = False,
    head: Annotated[Part, typer.Option(help="int4, int8: the head.")] = Part.int8,
    embeddings: Annotated[
        Part | None,
        typer.Option(help="int4, int8: the embeddings; kept unless tied to a quantized head."),
    ] = None,
    last_token_logits: Annotated[
        bool, typer.Option("--last-token-logits", help="Logits of each text's last token only.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="int4: a text instead of the built-in one; none: to nearest."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python files that come with the base.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fold block adapters into a base model and export it to ONNX, verified, for ONNX Runtime."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bone_fx.deploy.export import export
    from bone_fx.progress import Lines, Silent

    with nullcontext(Silent()) if quiet else Lines() as told:
        result = export(
            base,
            output=output,
            adapters=adapter or (),
            dtype=dtype.value,
            provider=provider.value,
            verify=verify.value,
            verify_on=verify_on.value if verify_on else None,
            overwrite=overwrite,
            block_size=block_size,
            symmetric=symmetric,
            head=head.value,
            embeddings=embeddings.value if embeddings else None,
            last_token_logits=last_token_logits,
            calibration=calibration,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=told,
        )
    for warning in result.warnings:
        typer.echo(f"note: {warning}", err=True)
    if as_json:
        typer.echo(
            json.dumps(
                {"output": str(result.output), "warnings": result.warnings, **result.manifest}
            )
        )
        return
    verified = result.manifest["verification"]
    figures = (
        "not verified"
        if verified is None
        else ", ".join(f"{k} {v:.2g}" for k, v in verified["figures"].items())
    )
    typer.echo(f"{result.output}: {figures}")


fold_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@fold_app.command(epilog=FOLD_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
def bone_export_fold(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Hugging Face folder, GGUF file or hub id.")
    ],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter",
            metavar="DIR",
            help="Bone, BAT or MiSS adapter in PEFT's layout; repeat to apply several, in order.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to publish.")
    ],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python files that come with the base.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result, or the error, as JSON on stdout.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fold block adapters into a checkpoint: a Hugging Face folder of the same layout."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from bone_fx.deploy.fold_checkpoint import fold_checkpoint
    from bone_fx.progress import Lines, Silent

    with nullcontext(Silent()) if quiet else Lines() as told:
        result = fold_checkpoint(
            base,
            adapters=adapter,
            output=output,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=told,
        )
    for warning in result.warnings:
        typer.echo(f"note: {warning}", err=True)
    if as_json:
        content = {"output": str(result.output), "warnings": result.warnings, **result.manifest}
        typer.echo(json.dumps(content))
        return
    typer.echo(f"{result.output}: {len(result.folded)} weights folded and read back")


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
