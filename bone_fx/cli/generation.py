"""The command `generate`: text from an exported decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bone_fx.cli.settings import AsJson, Debug, Quiet
from bone_fx.cli.terminal import answer, answer_json, answer_part
from bone_fx.cli.watching import progress_of


def generate(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Output of an export.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What a user says.")],
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens to generate at most.")
    ] = 256,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="The variant to run, of several.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="The prompt as it is, without the chat template.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate text with an exported decoder, in onnxruntime-genai, as its settings say."""
    from bone_fx.runtime.generation import Conversation

    with progress_of(context, quiet=quiet) as progress:
        progress.stage("open the model")
        conversation = Conversation(output, variant=variant)
    text = conversation.as_prompt(prompt, plain=plain)
    pieces = []
    for piece in conversation.generate(text, max_new_tokens):
        pieces.append(piece)
        if not as_json:
            answer_part(piece)
    if as_json:
        answer_json({"output": str(output), "prompt": text, "text": "".join(pieces)})
    else:
        answer("")
