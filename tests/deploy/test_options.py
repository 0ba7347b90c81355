"""Choices of an export: what is open, what it then is, what is refused before any work."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bone_fx
from bone_fx.cli import exporting
from bone_fx.deploy.options import _ALLOWED, _OTHER_WORDS, HELP, ExportOptions
from bone_fx.errors import UsageError

DEFAULTS = {choice.name: choice.default for choice in fields(ExportOptions)}
OF_MODULES = {"example_inputs", "dynamic_shapes"}


def defaults_of(function: Any, without: set[str]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if name not in without}


def test_export_and_the_command_line_have_the_same_choices() -> None:
    of_export = defaults_of(bone_fx.export, {"base", "output", "adapters", "variants", "progress"})
    assert of_export == DEFAULTS
    of_cli = defaults_of(
        exporting.export,
        {"context", "base", "output", "adapter", "variant", "as_json", "quiet", "debug"},
    )
    assert of_cli == {name: value for name, value in DEFAULTS.items() if name not in OF_MODULES}
    assert set(HELP) == set(of_cli)


def test_options_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ExportOptions().dtype = "fp16"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("choices", "weights", "activations"),
    [
        ({}, "fp32", "fp32"),
        ({"dtype": "bf16", "provider": "cuda"}, "bf16", "bf16"),
        ({"dtype": "int4"}, "int4", "fp32"),
        ({"dtype": "int8", "provider": "cuda"}, "int8", "fp16"),
    ],
)
def test_dtypes(choices: dict[str, Any], weights: str, activations: str) -> None:
    options = ExportOptions(**choices)
    assert (options.weight_dtype, options.activation_dtype) == (weights, activations)
    assert options.quantizes == weights.startswith("int")
    assert options.verification_provider == choices.get("provider", "cpu")
    assert ExportOptions(**choices, verify_on="cpu").verification_provider == "cpu"


@pytest.mark.parametrize(
    ("provider", "choices", "form"),
    [
        ("cpu", {}, (16, False)),
        ("cuda", {}, (32, True)),
        ("cuda", {"symmetric": False}, (32, False)),
        ("cuda", {"block_size": 64}, (64, True)),
        ("cpu", {"block_size": 32, "symmetric": True}, (32, True)),
    ],
)
def test_an_open_form_is_the_providers(
    provider: Any, choices: dict[str, Any], form: tuple[int, bool]
) -> None:
    assert ExportOptions(dtype="int4", provider=provider, **choices).form == form


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dtype", "fp8", "fp32 or fp16 or bf16 or int4 or int8"),
        ("provider", None, "cpu or cuda"),
        ("verify", "slow", "full or fast or off"),
        ("verify_on", "tpu", "cpu or cuda"),
        ("block_size", 24, "16 or 32 or 64 or 128 or 256"),
        ("head", "fp32", "keep or int4 or int8"),
        ("embeddings", "fp32", "keep or int4 or int8"),
    ],
)
def test_unknown_values_are_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(UsageError, match=f"{name}={value!r} is not known") as error:
        ExportOptions(**{name: value})
    assert allowed in str(error.value)


@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
@pytest.mark.parametrize(
    "choice", [{"block_size": 16}, {"symmetric": False}, {"head": "int8"}, {"embeddings": "keep"}]
)
def test_a_choice_of_quantization_is_refused_elsewhere_though_it_is_the_default(
    dtype: Any, choice: dict[str, Any]
) -> None:
    name = next(iter(choice))
    expected = f"{name} goes with a quantized export, and dtype is {dtype or 'fp32'!r}"
    with pytest.raises(UsageError, match=expected):
        ExportOptions(dtype=dtype, **choice)
    ExportOptions(dtype="int8", **choice)


def test_bf16_is_not_for_the_cpu() -> None:
    with pytest.raises(UsageError, match="does not load a bf16 model on the CPU provider"):
        ExportOptions(dtype="bf16")
    with pytest.raises(UsageError, match="--provider cuda"):
        ExportOptions(dtype="bf16", verify="off", verify_on="cuda")
    ExportOptions(dtype="bf16", provider="cuda", verify_on="cpu")


def test_a_calibration_is_for_int4(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    with pytest.raises(UsageError, match="is no file"):
        ExportOptions(dtype="int4", calibration=text)
    text.write_text("some words")
    with pytest.raises(UsageError, match="calibration is for int4 and a cache in 8 bits, and"):
        ExportOptions(calibration=text)
    ExportOptions(dtype="int4", calibration=text)
    ExportOptions(kv_cache="int8", calibration=text)
    ExportOptions(calibration="none")


def test_a_cuda_graph_goes_with_cuda() -> None:
    with pytest.raises(UsageError, match="cuda_graph goes with provider cuda"):
        ExportOptions(cuda_graph=True)
    ExportOptions(cuda_graph=False)


@pytest.mark.parametrize(
    "choice",
    [
        {"dtype": "fp16"},
        {"dtype": "int8"},
        {"revision": "main"},
        {"calibration": "none"},
        {"kv_cache": "int8"},
        {"last_token_logits": True},
        {"cuda_graph": True, "provider": "cuda"},
    ],
)
def test_choices_of_a_checkpoint_are_refused_for_a_module(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    inputs = (torch.zeros(2, 4),)
    with pytest.raises(UsageError, match=f"{next(iter(choice))}.* goes with a checkpoint"):
        bone_fx.export(nn.Linear(4, 4), output=tmp_path / "out", example_inputs=inputs, **choice)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("choice", "written", "meant"),
    [
        ("dtype", "torch.float16", "fp16"),
        ("dtype", "8-bit", "int8"),
        ("provider", "gpu", "cuda"),
        ("verify", "none", "off"),
        ("kv_cache", "fp16", "float"),
    ],
)
def test_another_word_for_a_value_is_told_the_right_one(
    choice: str, written: str, meant: str
) -> None:
    with pytest.raises(UsageError, match=f"next: +{choice}='{meant}'$"):
        ExportOptions(**{choice: written})


def test_every_other_word_stands_for_one_value() -> None:
    for choice, words in _OTHER_WORDS.items():
        others = [other for each in words.values() for other in each]
        assert set(words) <= set(_ALLOWED[choice])
        assert len(set(others)) == len(others)
        assert not set(others) & set(_ALLOWED[choice])
