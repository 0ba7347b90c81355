"""Calls that cannot mean anything: what is wrong with them, and what was probably meant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from bone_fx.deploy.options import right_word
from bone_fx.errors import UsageError

_OTHER_COMMANDS = {
    "fold": ("merge", "merge_and_unload", "bake"),
    "verify": ("check", "test", "validate"),
    "inspect": ("show", "info", "describe"),
    "convert": ("save_as_lora", "transform"),
    "generate": ("chat", "run", "infer", "complete"),
    "doctor": ("env", "diagnose", "status"),
}
_OTHER_FLAGS = {
    "--adapter": ("--adapters", "--lora", "--peft", "--peft-model", "--bone", "-a"),
    "--output": ("--out", "--out-dir", "--output-dir", "--save", "--dest"),
    "--dtype": ("--precision", "--quantize", "--quantization", "--quant", "--bits", "--type"),
    "--provider": ("--device", "--ep", "--execution-provider", "--gpu", "--cuda", "--cpu"),
    "--overwrite": ("--force", "-f", "-y", "--yes", "--replace"),
    "--verify off": ("--no-verify", "--skip-verify", "--no-validation"),
    "--verify full": ("--validate", "--check"),
    "--block-size": ("--group-size", "--groupsize"),
    "--symmetric": ("--sym", "--symm"),
    "--quiet": ("--silent", "-s", "--no-progress"),
    "--debug": ("--traceback", "--verbose", "-v"),
    "--version": ("-V",),
    "--max-new-tokens": ("--max-tokens", "-n", "--tokens", "--length", "--max-length"),
    "--plain": ("--raw", "--no-template", "--no-chat-template", "--no-chat"),
}
"""What other tools call the options."""
_POSITIONS = {
    "BASE": ("--model", "--base-model", "--base", "-m", "--input", "-i"),
    "PROMPT": ("--prompt", "-p", "--text"),
    "OUT": ("--output", "-o", "--folder", "--model"),
    "ADAPTER": ("--adapter",),
}
"""What other tools have an option for, and this program an argument in its place."""


_CALLS = {
    "export": "bone-export BASE -o OUT",
    "fold": "bone-export fold BASE --adapter DIR -o OUT",
    "verify": "bone-export verify OUT",
    "inspect": "bone-export inspect ADAPTER",
    "generate": 'bone-export generate OUT "PROMPT"',
}
"""The shortest call of each command that takes arguments."""


def check_spelling(word: str, commands: Sequence[str]) -> None:
    """Refuse a word that is nearly a command's, and nothing that an export could take as its base.

    Raises:
        UsageError: It is one.
    """
    if not word.isidentifier() or os.path.lexists(word):
        return
    called = {other: name for name, others in _OTHER_COMMANDS.items() for other in others}
    near = get_close_matches(word.lower(), commands, 1, 0.7)
    meant = called.get(word.lower()) or next(iter(near), None)
    if meant is not None:
        raise UsageError(
            f"there is no command {word}: it is called {meant}",
            next_step=f"bone-export {meant} --help; a base of that name is ./{word}",
        )


def explain(error: Any, command: str, arguments: Sequence[str], program: Any) -> UsageError:
    """What to say about arguments that a command does not take.

    Args:
        error: Click's usage error.
        command: Name of the command.
        arguments: Its arguments.
        program: The program, with its commands.
    """
    parameters = program.commands[command].params
    help_call = f"bone-export {command} --help"
    unknown = getattr(error, "option_name", None)
    if unknown is not None and hasattr(error, "possibilities"):
        return _unknown_option(unknown, command, arguments, program)
    if unknown is not None:
        option = next((p for p in parameters if unknown in p.opts), None)
        return UsageError(
            f"{unknown} is given without its value",
            expected=None if option is None else f"{unknown} {_value_of(option, error.ctx)}",
            next_step=help_call,
        )
    parameter = getattr(error, "param", None)
    if parameter is None:
        return _too_many(error, command, parameters, arguments, help_call)
    name = _shown(parameter)
    if hasattr(error, "param_type"):  # an argument or option that is not there
        value = "" if parameter.param_type_name == "argument" else f" {parameter.metavar}"
        return UsageError(f"{name}{value} is missing", next_step=f"{_CALLS[command]}; {help_call}")
    choices = [str(choice) for choice in parameter.type_descriptor.choices or ()]
    if not choices:
        return UsageError(error.format_message(), next_step=help_call)
    value = next(iter(_wrong_values(parameter.opts, arguments, choices)), "")
    meant = right_word(parameter.name, value, choices)
    return UsageError(
        f"{name} takes no {value}" if meant is None else f"{value} is called {meant} here",
        expected=f"{name} {'|'.join(choices)}",
        next_step="choose one of these" if meant is None else f"{name} {meant}",
    )


def _unknown_option(name: str, command: str, arguments: Sequence[str], program: Any) -> UsageError:
    own = _flags(program.commands[command].params)
    help_call = f"bone-export {command} --help"
    wrong = next((a for a in arguments if not a.startswith("--") and f"-{a}" in own), None)
    if wrong is not None and wrong.startswith(name):
        return UsageError(f"there is no option {wrong}", next_step=f"-{wrong}, with two dashes")
    params = program.commands[command].params
    places = {each.metavar for each in params if each.param_type_name == "argument"}
    for place, flags in _POSITIONS.items():
        if name in flags and place in places:
            return UsageError(
                f"there is no option {name}: {place} stands without one",
                next_step=_CALLS[command],
            )
    plain = name.lower().replace("_", "-")
    called = {other: flag for flag, others in _OTHER_FLAGS.items() for other in others}
    meant = called.get(name) or called.get(plain)
    if meant is not None and meant.split()[0] not in own | _flags(program.params):
        meant = None
    others = [c for c, each in program.commands.items() if name in _flags(each.params)]
    if meant is None and others:
        return UsageError(
            f"{command} has no option {name}, only {' and '.join(others)}", next_step=help_call
        )
    if meant is None:
        known = {*own, *_flags(program.params), "--help"}
        meant = next(iter(get_close_matches(plain, sorted(known), 1)), None)
    if meant is not None:
        return UsageError(f"there is no option {name}", next_step=f"did you mean {meant}?")
    return UsageError(f"there is no option {name}", next_step=help_call)


def _too_many(
    error: Any, command: str, parameters: Sequence[Any], arguments: Sequence[str], help_call: str
) -> UsageError:
    """What to say about one argument more than a command takes, or an error of another kind."""
    own = _flags(parameters)
    wrong = next((a for a in arguments if a[:1] == "-" and a[:2] != "--" and f"-{a}" in own), None)
    if wrong is not None:
        return UsageError(f"there is no option {wrong}", next_step=f"-{wrong}, with two dashes")
    message = error.format_message()
    if "--adapter" in own:
        for each in arguments:
            if (Path(each) / "adapter_config.json").exists() and f"({each}" in message:
                return UsageError(
                    f"{each} is an adapter without its option", next_step=f"--adapter {each}"
                )
    quoted = command == "generate" and "extra argument" in message
    return UsageError(
        message.rstrip("."), next_step="put the prompt in quotes" if quoted else help_call
    )


def _flags(parameters: Sequence[Any]) -> set[str]:
    options = [p for p in parameters if p.param_type_name == "option"]
    return {name for p in options for name in (*p.opts, *p.secondary_opts)}


def _shown(parameter: Any) -> str:
    """A parameter as a person writes it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar)
    return str(max(parameter.opts, key=len))


def _value_of(option: Any, context: Any) -> str:
    return str(option.metavar or option.display_type(context).strip("<>"))


def _wrong_values(
    flags: Sequence[str], arguments: Sequence[str], choices: Sequence[str]
) -> Iterator[str]:
    """Values given to an option that are none of its choices."""
    for place, argument in enumerate(arguments):
        flag, sign, value = argument.partition("=")
        if flag in flags:
            given = value if sign else "".join(arguments[place + 1 : place + 2])
            if given not in choices:
                yield given
