"""The commands of `bone-export`: flags to the options of one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from bone_fx.cli.settings import (
    HELP_FLAGS,
    SETTINGS,
    AllowUnused,
    AsJson,
    Debug,
    Quiet,
    RemoteCode,
    Revision,
    option,
)
from bone_fx.cli.signals import Signals
from bone_fx.cli.terminal import answer, answer_json, note
from bone_fx.cli.views import VIEWS
from bone_fx.deploy.options import (
    DTYPE,
    FLOAT_CACHE,
    FORM_SAID,
    HEAD,
    Compared,
    Dtype,
    ExportOptions,
    KvCache,
    Part,
    Provider,
    Verify,
)
from bone_fx.errors import UsageError
from bone_fx.progress import PUBLISH, Lines, Progress, Silent

if TYPE_CHECKING:
    from bone_fx.deploy.export import ExportResult
    from bone_fx.deploy.fold_checkpoint import FoldResult

# typer >= 0.29 carries its own click and exports of its errors only this subclass of the usage
# error.
_WRONG_USAGE = cast("type[typer.BadParameter]", typer.BadParameter.__bases__[0])
_INTERRUPTED = 130
"""What typer returns for a command that Ctrl-C ended, which it does not raise."""

EPILOG = """\b
Commands:
  bone-export fold BASE --adapter DIR -o OUT   (a checkpoint, no ONNX; bone-export fold --help)
  bone-export verify OUT --base BASE --adapter DIR   (an output again; bone-export verify --help)
  bone-export inspect ADAPTER                  (what an adapter is; bone-export inspect --help)
  bone-export doctor                           (what is wrong with the environment)

\b
Examples:
  bone-export ./SmolLM2-135M-Instruct --adapter ./my-adapter -o ./out
  bone-export ./base --adapter ./style --adapter ./facts -o ./out --dtype fp16
  bone-export model.gguf -o ./out --json
  bone-export fold ./base --adapter ./my-adapter -o ./folded

\b
Exit codes: 0 published, 2 usage, 3 input refused, 4 fold failed, 5 export failed,
6 verification failed, 7 provider not to be had, 70 a fault of bone_fx, 129, 130, 143 ended by
SIGHUP, SIGINT, SIGTERM. Nothing is published unless the code is 0.
"""


FOLD_EPILOG = """\b
Examples:
  bone-export fold ./base --adapter ./my-adapter -o ./folded
  bone-export fold ./base --adapter ./style --adapter ./facts -o ./folded --json

Exit codes as for bone-export.
"""


VERIFY_EPILOG = """\b
Examples:
  bone-export verify ./out
  bone-export verify ./out --base ./base --adapter ./my-adapter --samples ./texts.txt

Without --base the files are hashed and the graph is run; with it, everything is compared again.
Exit codes as for bone-export; nothing is written.
"""


Base = Annotated[
    str, typer.Argument(metavar="BASE", help="Hugging Face folder, GGUF file or hub id.")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder to publish.")]
ADAPTER = typer.Option(
    "--adapter",
    metavar="DIR",
    help="Bone, BAT or MiSS adapter in PEFT's layout; repeat to apply several, in order.",
)
VARIANT = typer.Option(
    "--variant",
    metavar="NAME=DIR",
    help="Instead of --adapter: an adapter that gets a graph of its own, NAME.onnx, over common "
    "weights; repeat for several.",
)
VARIANT_AGAIN = typer.Option(
    "--variant",
    metavar="NAME=DIR",
    help="Of a folder of variants: the adapter that one was made from; repeat for each.",
)
Overwrite = Annotated[bool, option("overwrite", "--overwrite")]

app = typer.Typer(**SETTINGS)
fold_app = typer.Typer(**SETTINGS)
verify_app = typer.Typer(**SETTINGS)


@app.command(epilog=EPILOG, context_settings=HELP_FLAGS)
def bone_export(
    context: typer.Context,
    base: Base,
    output: Output,
    adapter: Annotated[list[str] | None, ADAPTER] = None,
    variant: Annotated[list[str] | None, VARIANT] = None,
    dtype: Annotated[Dtype | None, option("dtype", show_default=DTYPE)] = None,
    provider: Annotated[Provider, option("provider")] = "cpu",
    verify: Annotated[Verify, option("verify")] = "full",
    verify_on: Annotated[Provider | None, option("verify_on")] = None,
    samples: Annotated[str | None, option("samples", metavar="FILE")] = None,
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
    """Fold block adapters into a base model and export it to ONNX, verified, for ONNX Runtime."""
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
    from bone_fx.deploy.export import export_with

    with _progress(context, quiet=quiet) as progress:
        result = export_with(
            base, adapter or (), output, options, progress, _variants(variant or [])
        )
    verification = result.manifest["verification"]
    figures = "not verified" if verification is None else _figures(verification)
    _report(result, figures, as_json=as_json)


def _variants(given: list[str]) -> dict[str, str]:
    """Names and folders of `NAME=DIR`."""
    pairs = [each.partition("=") for each in given]
    names = [name for name, _, _ in pairs]
    for each, (name, _, folder) in zip(given, pairs, strict=True):
        if not name or not folder or names.count(name) > 1:
            raise UsageError(
                f"--variant {each} does not name a variant",
                expected="NAME=DIR, each name once",
                next_step="--variant poet=./poet-adapter",
            )
    return {name: folder for name, _, folder in pairs}


@fold_app.command(epilog=FOLD_EPILOG, context_settings=HELP_FLAGS)
def bone_export_fold(
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
    """Fold block adapters into a checkpoint: a Hugging Face folder of the same layout."""
    from bone_fx.deploy.fold_checkpoint import fold_checkpoint

    with _progress(context, quiet=quiet) as progress:
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


@verify_app.command(epilog=VERIFY_EPILOG, context_settings=HELP_FLAGS)
def bone_export_verify(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Output of an export or a fold.")],
    base: Annotated[
        str | None, typer.Option("--base", metavar="BASE", help="The base that it was made from.")
    ] = None,
    adapter: Annotated[list[str] | None, ADAPTER] = None,
    variant: Annotated[list[str] | None, VARIANT_AGAIN] = None,
    provider: Annotated[Provider, typer.Option(help="Provider to run the graph on.")] = "cpu",
    verify: Annotated[Compared, typer.Option(help="How much is compared with torch.")] = "full",
    samples: Annotated[str | None, option("samples", metavar="FILE")] = None,
    revision: Revision = None,
    allow_unused: AllowUnused = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Verify an output again, from its files and its manifest."""
    from bone_fx.deploy.verify_export import verify_export

    with _progress(context, quiet=quiet) as progress:
        result = verify_export(
            output,
            base=base,
            adapters=adapter or (),
            variants=_variants(variant or []),
            provider=provider,
            verify=verify,
            samples=samples,
            revision=revision,
            allow_unused=allow_unused,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    for warning in result.warnings:
        note(warning)
    found = {"files": result.files, "verification": result.verification}
    if as_json:
        answer_json({"output": str(result.output), "warnings": result.warnings, **found})
    else:
        compared = "" if result.verification is None else _figures(result.verification)
        answer(f"{result.output}: {result.files} files as exported. {compared}".rstrip())


class _Watched:
    """Progress that also tells the handlers of signals where the run is."""

    def __init__(self, shown: Progress, signals: Signals) -> None:
        self._shown = shown
        self._signals = signals

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._signals.stage(publishes=name == PUBLISH)
        self._shown.stage(name)

    def advance(self, done: int, total: int) -> None:
        """`done` of `total` bytes of the current stage."""
        self._signals.stage(publishes=False)
        self._shown.advance(done, total)


@contextmanager
def _progress(context: typer.Context, *, quiet: bool) -> Iterator[Progress]:
    with nullcontext(Silent()) if quiet else Lines() as shown:
        yield _Watched(shown, context.obj)


def _figures(verification: Mapping[str, Any]) -> str:
    """The figures of a verification in a line; how tokens are spread stands in the manifest."""
    figures = verification["figures"].items()
    return ", ".join(f"{k} {v:.2g}" for k, v in figures if not k.endswith(("_top1", "_kl")))


def _report(result: ExportResult | FoldResult, summary: str, *, as_json: bool) -> None:
    """Notes on stderr; on stdout the summary in a line, or everything as JSON."""
    for warning in result.warnings:
        note(warning)
    if as_json:
        content = {"output": str(result.output), "warnings": result.warnings, **result.manifest}
        answer_json(content)
    else:
        answer(f"{result.output}: {summary}")


COMMANDS = {"fold": fold_app, "verify": verify_app, **VIEWS}
"""Every command besides the export, by name."""


def split(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command that the arguments name, "" for an export, and the other arguments.

    The first argument that is no option, nor the value of one, is the command if it is one's name;
    a base of that name is `./fold`.
    """
    takes_value = _options_with_value()
    is_value = False
    for place, argument in enumerate(arguments):
        if is_value:
            is_value = False
        elif argument == "--":
            break
        elif argument.startswith("--"):
            is_value = argument in takes_value
        elif argument.startswith("-") and argument != "-":
            first = next((c for c in argument[1:] if f"-{c}" in takes_value), None)
            is_value = first is not None and argument.index(first) == len(argument) - 1
        elif argument in COMMANDS:
            return argument, [*arguments[:place], *arguments[place + 1 :]]
        else:
            break
    return "", list(arguments)


def start(command: str, arguments: Sequence[str], signals: Signals) -> int:
    """Run a command with its arguments; returns the exit status of one that ended well.

    Raises:
        UsageError: The arguments cannot mean anything.
        KeyboardInterrupt: It was interrupted.
        BoneFxError: One of its kinds.
    """
    program = f"bone-export {command}".rstrip()
    run = COMMANDS.get(command, app)
    try:
        status = run(list(arguments), standalone_mode=False, prog_name=program, obj=signals)
    except _WRONG_USAGE as error:
        raise UsageError(error.format_message(), next_step=f"{program} --help") from None
    except typer.Abort:
        status = _INTERRUPTED
    if status == _INTERRUPTED:
        raise KeyboardInterrupt
    return status or 0


def _options_with_value() -> set[str]:
    """The options of all commands that the next argument belongs to."""
    return {
        option
        for each in (app, *COMMANDS.values())
        for parameter in typer.main.get_command(each).params
        if parameter.param_type_name == "option" and not getattr(parameter, "is_flag", False)
        for option in parameter.opts
    }
