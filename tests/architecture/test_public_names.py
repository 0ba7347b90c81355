"""The public interface, frozen: a change of it changes this file in the same commit."""

from __future__ import annotations

import importlib
import inspect
import re
from importlib import metadata
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import bone_fx
from bone_fx import cli, errors
from bone_fx.cli import exporting
from bone_fx.cli.commands import program

PUBLIC = {
    "AdaptedModule",
    "AdapterTrainer",
    "BoneConfig",
    "BoneFxError",
    "ExportResult",
    "FoldResult",
    "MissConfig",
    "PassResult",
    "PeftModel",
    "VerifyResult",
    "adapt",
    "export",
    "fold_adapters",
    "fold_checkpoint",
    "get_base_model_state_dict",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "insert_adapters",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "verify_export",
}
ALIASES = {"PeftModel": "AdaptedModule"}
"""Names that PEFT has for what is called otherwise here."""
OPTIONS = {
    "base": [],
    "output": ["--output", "-o"],
    "adapter": ["--adapter"],
    "variant": ["--variant"],
    "dtype": ["--dtype"],
    "provider": ["--provider"],
    "verify": ["--verify"],
    "verify_on": ["--verify-on"],
    "samples": ["--samples"],
    "overwrite": ["--overwrite"],
    "block_size": ["--block-size"],
    "symmetric": ["--symmetric", "--asymmetric"],
    "head": ["--head"],
    "embeddings": ["--embeddings"],
    "kv_cache": ["--kv-cache"],
    "last_token_logits": ["--last-token-logits"],
    "cuda_graph": ["--cuda-graph", "--no-cuda-graph"],
    "calibration": ["--calibration"],
    "revision": ["--revision"],
    "allow_unused": ["--allow-unused"],
    "trust_remote_code": ["--trust-remote-code"],
    "as_json": ["--json"],
    "quiet": ["--quiet", "-q"],
    "debug": ["--debug"],
    "help": ["-h", "--help"],
}
FOLD_OPTIONS = {
    name: OPTIONS[name]
    for name in (
        "base",
        "adapter",
        "output",
        "overwrite",
        "revision",
        "allow_unused",
        "trust_remote_code",
        "as_json",
        "quiet",
        "debug",
        "help",
    )
}
VERIFY_OPTIONS = {
    **{name: found for name, found in FOLD_OPTIONS.items() if name != "overwrite"},
    "output": [],
    "base": ["--base"],
    **{name: OPTIONS[name] for name in ("variant", "provider", "verify", "samples")},
}
INSPECT_OPTIONS = {
    "adapter": [],
    "base": ["--base"],
    **{
        name: OPTIONS[name]
        for name in (
            *("revision", "allow_unused", "trust_remote_code", "as_json", "quiet", "debug"),
            "help",
        )
    },
}
DOCTOR_OPTIONS = {name: OPTIONS[name] for name in ("as_json", "quiet", "debug", "help")}
GENERATE_OPTIONS = {
    "output": [],
    "prompt": [],
    "max_new_tokens": ["--max-new-tokens"],
    "variant": ["--variant"],
    "plain": ["--plain"],
    **DOCTOR_OPTIONS,
}
COMMANDS = {
    "export": OPTIONS,
    "fold": FOLD_OPTIONS,
    "verify": VERIFY_OPTIONS,
    "inspect": INSPECT_OPTIONS,
    "generate": GENERATE_OPTIONS,
    "doctor": DOCTOR_OPTIONS,
}
PROGRAM_OPTIONS = {
    "version": ["--version"],
    "install_completion": ["--install-completion"],
    "show_completion": ["--show-completion"],
    "help": ["-h", "--help"],
}
CHOICES = {
    "dtype": (None, ["fp32", "fp16", "bf16", "int4", "int8"]),
    "provider": ("cpu", ["cpu", "cuda"]),
    "head": (None, ["keep", "int4", "int8"]),
    "embeddings": (None, ["keep", "int4", "int8"]),
    "kv_cache": ("float", ["float", "int8", "fp8"]),
    "verify": ("full", ["full", "fast", "off"]),
    "verify_on": (None, ["cpu", "cuda"]),
}
EFFECTIVE = {
    "dtype": "fp32",
    "block-size": "16, on cuda 32",
    "symmetric": "asymmetric, on cuda symmetric",
    "head": "int8",
}
"""What a choice is that was left open, as the help says it."""
EXIT_CODES = {
    "BoneFxError": 70,
    "UsageError": 2,
    "InputRefusedError": 3,
    "FoldError": 4,
    "ExportError": 5,
    "VerificationError": 6,
    "ProviderError": 7,
}


def _options(command: Any) -> dict[str, list[str]]:
    """The options of a command by parameter name, arguments with none."""
    with command.make_context("bone-export", [], resilient_parsing=True) as context:
        listed = command.get_params(context)
    return {
        str(p.name): sorted([] if p.param_type_name == "argument" else [*p.opts, *p.secondary_opts])
        for p in listed
    }


def _choices() -> dict[str, tuple[str | None, list[str]]]:
    """Default and allowed values of every parameter that takes one of a few words."""
    hints = get_type_hints(exporting.export)
    return {
        name: (parameter.default, list(get_args(kind)))
        for name, parameter in inspect.signature(exporting.export).parameters.items()
        for kind in (hints[name], *get_args(hints[name]))
        if get_origin(kind) is Literal
    }


def test_public_names() -> None:
    assert set(bone_fx.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(bone_fx, name)
    assert value.__name__ == ALIASES.get(name, name)
    assert value.__doc__


def test_version_is_the_installed_one() -> None:
    assert bone_fx.__version__ == metadata.version("bone_fx")


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = bone_fx.nonsense


def test_commands() -> None:
    assert list(program().commands) == list(COMMANDS)
    assert _options(program()) == {n: sorted(options) for n, options in PROGRAM_OPTIONS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_line_options(name: str) -> None:
    expected = {parameter: sorted(options) for parameter, options in COMMANDS[name].items()}
    assert _options(program().commands[name]) == expected


def test_command_line_choices_and_defaults() -> None:
    assert _choices() == CHOICES


@pytest.mark.parametrize("name", EFFECTIVE)
def test_help_says_what_an_open_choice_is(name: str) -> None:
    command = program().commands["export"]
    with command.make_context("bone-export", [], resilient_parsing=True) as context:
        text = " ".join(command.get_help(context).split())
    default = re.search(rf" --{name} .*?\[default: \(([\w, ]+)\)]", text)
    assert default is not None
    assert default[1] == EFFECTIVE[name]


def test_console_script() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="bone-export")
    module, _, function = script.value.partition(":")
    assert getattr(importlib.import_module(module), function) is cli.program


def test_exit_codes() -> None:
    assert {name: getattr(errors, name).exit_code for name in EXIT_CODES} == EXIT_CODES
