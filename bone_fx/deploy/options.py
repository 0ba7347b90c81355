"""The choices of an export: one frozen object from the command line down to the builders.

Names, allowed values, defaults and help sentences stand here and nowhere else. None means that a
person left a choice open; a property gives what it then is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from bone_fx.errors import UsageError
from bone_fx.files.nearby import meant

Dtype = Literal["fp32", "fp16", "bf16", "int4", "int8"]
Provider = Literal["cpu", "cuda"]
Verify = Literal["full", "fast", "off"]
Compared = Literal["full", "fast"]
AdapterKind = Literal["lora", "bone", "miss"]
"""What an adapter is converted to."""
"""How much `verify_export` compares."""
Part = Literal["keep", "int4", "int8"]
"""What the head or the embeddings of a quantized model become."""
KvCache = Literal["float", "int8", "fp8"]
"""What a decoder keeps keys and values in between its steps."""

BITS = {"int4": 4, "int8": 8}
"""Bits of a weight by the dtypes that quantize."""
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""Values of a quantized weight that may share a scale."""
NO_CALIBRATION = "none"
FLOAT_CACHE: KvCache = "float"
FP8_CACHE: KvCache = "fp8"

DTYPE: Dtype = "fp32"
HEAD: Part = "int8"


class Form(NamedTuple):
    """How groups of a weight are quantized.

    Attributes:
        block_size: Values that share a scale.
        symmetric: No zero points.
    """

    block_size: int
    symmetric: bool


FORMS: dict[Provider, Form] = {"cpu": Form(16, symmetric=False), "cuda": Form(32, symmetric=True)}
"""What is left open about a quantized weight: the closest form on the CPU, the one that the fast
kernels take on CUDA (`deploy.builds.weight_only`)."""
FORM_SAID = {
    "block_size": f"{FORMS['cpu'].block_size}, on cuda {FORMS['cuda'].block_size}",
    "symmetric": "asymmetric, on cuda symmetric",
}
"""The same in words, for the command line."""

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "dtype": get_args(Dtype),
    "provider": get_args(Provider),
    "verify": get_args(Verify),
    "block_size": BLOCK_SIZES,
    "head": get_args(Part),
    "embeddings": get_args(Part),
    "verify_on": get_args(Provider),
    "kv_cache": get_args(KvCache),
}
_QUANTIZED_ONLY = ("block_size", "symmetric", "head", "embeddings")

_UNCHANGED = ("none", "no", "off", "fp16", "fp32")
_OTHER_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "dtype": {
        "fp32": ("float32", "float", "f32", "full", "single", "32"),
        "fp16": ("float16", "half", "f16", "16"),
        "bf16": ("bfloat16", "brainfloat"),
        "int4": ("uint4", "4", "4bit", "4-bit", "q4", "w4", "i4"),
        "int8": ("uint8", "8", "8bit", "8-bit", "q8", "w8", "i8"),
    },
    "provider": {
        "cuda": ("gpu", "nvidia", "cuda:0", "cudaexecutionprovider"),
        "cpu": ("cpuexecutionprovider", "host"),
    },
    "verify": {
        "full": ("yes", "true", "on", "all", "1", "slow"),
        "fast": ("quick", "some"),
        "off": ("no", "none", "false", "skip", "0"),
    },
    "head": {"keep": (*_UNCHANGED, "float"), "int4": ("4", "4bit"), "int8": ("8", "8bit")},
    "kv_cache": {"float": (*_UNCHANGED, "keep"), "int8": ("8", "8bit", "q8", "uint8")},
}
"""What people call the values elsewhere: they are told the word, and nothing is assumed."""
_OTHER_WORDS |= {"verify_on": _OTHER_WORDS["provider"], "embeddings": _OTHER_WORDS["head"]}


def right_word(choice: str, value: object, allowed: Sequence[object]) -> object | None:
    """The allowed value that a person means who wrote another word for it; None for no idea.

    Args:
        choice: Name of the choice, such as `dtype`.
        value: What was written.
        allowed: What may be written.
    """
    word = str(value).strip().lower().removeprefix("torch.")
    of_word = {w: right for right, words in _OTHER_WORDS.get(choice, {}).items() for w in words}
    if of_word.get(word) in allowed:
        return of_word[word]
    near = get_close_matches(word, [str(each) for each in allowed], 1)
    return next((each for each in allowed if str(each) in near), None)


@dataclass(frozen=True, eq=False)
class ExportOptions:
    """What a person chooses about an export; `bone_fx.export` says what each choice means.

    Raises:
        UsageError: A value is not allowed, or two choices contradict each other.
    """

    dtype: Annotated[Dtype | None, "Dtype of weights and activations; int4, int8: of weights."] = (
        None
    )
    provider: Annotated[Provider, "Provider that the graph is written for."] = "cpu"
    verify: Annotated[Verify, "Compare with torch before publishing."] = "full"
    verify_on: Annotated[Provider | None, "Verify on another provider than --provider."] = None
    samples: Annotated[
        str | Path | None, "A text: its likelihood a token under base, adapter and export."
    ] = None
    overwrite: Annotated[bool, "Replace an earlier output."] = False
    block_size: Annotated[int | None, "int4, int8: values of a weight that share a scale."] = None
    symmetric: Annotated[bool | None, "int4, int8: no zero points."] = None
    head: Annotated[Part | None, "int4, int8: the head."] = None
    embeddings: Annotated[
        Part | None, "int4, int8: the embeddings; kept unless tied to a quantized head."
    ] = None
    kv_cache: Annotated[
        KvCache,
        "Keys and values between a decoder's steps; int8 takes a quarter of fp32's bytes, as does "
        "fp8, for cuda.",
    ] = FLOAT_CACHE
    last_token_logits: Annotated[bool, "Logits of each text's last token only."] = False
    cuda_graph: Annotated[
        bool | None, "cuda: let onnxruntime-genai replay decode steps as a CUDA graph."
    ] = None
    calibration: Annotated[
        str | Path | None,
        "int4, cache in 8 bits: a text instead of the built-in one; none: weights to nearest.",
    ] = None
    revision: Annotated[str | None, "Branch, tag or commit of a hub id."] = None
    allow_unused: Annotated[
        Sequence[str] | None,
        "Leave out tensors of this name or pattern that the model does not take.",
    ] = None
    trust_remote_code: Annotated[bool, "Run Python files that come with the base."] = False
    example_inputs: Any = None
    dynamic_shapes: Any = None

    def __post_init__(self) -> None:
        for choice in fields(self):
            value, allowed = getattr(self, choice.name), _ALLOWED.get(choice.name)
            if allowed is not None and value != choice.default and value not in allowed:
                meant = right_word(choice.name, value, allowed)
                raise UsageError(
                    f"{choice.name}={value!r} is not known",
                    expected=" or ".join(map(str, allowed)),
                    next_step="choose one of these"
                    if meant is None
                    else f"{choice.name}={meant!r}",
                )
        self._check_quantization()
        self._check_calibration()
        check_samples(self.samples, self.verify)
        self._check_provider()
        self._check_cuda_graph()
        self._check_cache()

    @property
    def weight_dtype(self) -> Dtype:
        """Dtype of a checkpoint's weights in the graph."""
        return self.dtype or DTYPE

    @property
    def activation_dtype(self) -> str:
        """Dtype of activations, cache and logits."""
        if self.quantizes:
            return "fp16" if self.provider == "cuda" else "fp32"
        return self.weight_dtype

    @property
    def quantizes(self) -> bool:
        """Whether the weights of products are quantized."""
        return self.dtype in BITS

    @property
    def form(self) -> Form:
        """How groups of a quantized weight are stored."""
        usual = FORMS[self.provider]
        return Form(
            usual.block_size if self.block_size is None else self.block_size,
            usual.symmetric if self.symmetric is None else self.symmetric,
        )

    @property
    def verification_provider(self) -> Provider:
        """Where the written model, or its twin, runs to be compared with torch."""
        if self.kv_cache == FP8_CACHE:
            return "cpu"
        return self.verify_on or self.provider

    def _check_provider(self) -> None:
        """Refuse a dtype that ONNX Runtime's provider has no kernels for."""
        if self.dtype == "bf16" and self.provider == "cpu":
            raise UsageError(
                "ONNX Runtime does not load a bf16 model on the CPU provider",
                expected="dtype fp32 or fp16 with provider cpu, or bf16 with provider cuda",
                found="dtype='bf16' with provider='cpu'",
                next_step="--dtype fp16, or --provider cuda (and --verify-on cpu where there is no "
                "GPU)",
            )

    def _check_cuda_graph(self) -> None:
        if self.cuda_graph and self.provider != "cuda":
            raise UsageError(
                f"cuda_graph goes with provider cuda, and provider is {self.provider!r}",
                next_step="leave it out, or export with --provider cuda",
            )

    def _check_cache(self) -> None:
        """Refuse a cache in fp8 where nothing can run it."""
        if self.kv_cache != FP8_CACHE:
            return
        if self.provider != "cuda":
            raise UsageError(
                "ONNX Runtime keeps a cache in fp8 on CUDA only",
                expected="kv_cache float or int8 with provider cpu",
                found=f"kv_cache='fp8' with provider={self.provider!r}",
                next_step="--kv-cache int8, or --provider cuda",
            )
        if self.verify_on == "cuda":
            raise UsageError(
                "a cache in fp8 is verified on the CPU, through a twin of the graph",
                found="verify_on='cuda'",
                next_step="leave out --verify-on, and run tools/gpu_check.py on the card",
            )

    def _check_quantization(self) -> None:
        """Refuse choices that only a quantized export has."""
        chosen = [name for name in _QUANTIZED_ONLY if getattr(self, name) is not None]
        if chosen and not self.quantizes:
            raise UsageError(
                f"{', '.join(chosen)} goes with a quantized export, "
                f"and dtype is {self.weight_dtype!r}",
                expected="dtype " + " or ".join(BITS),
                next_step="leave it out, or choose such a dtype",
            )

    def _check_calibration(self) -> None:
        if self.calibration is None or self.calibration == NO_CALIBRATION:
            return
        if self.dtype != "int4" and self.kv_cache == FLOAT_CACHE:
            raise UsageError(
                "calibration is for int4 and a cache in 8 bits, "
                f"and dtype is {self.weight_dtype!r}",
                next_step="export without it",
            )
        if not Path(self.calibration).expanduser().is_file():
            raise UsageError(
                f"calibration={str(self.calibration)!r} is no file",
                expected="a text file, or none",
                next_step=meant(
                    self.calibration, "name a file, or leave it out for the built-in text"
                ),
            )


def check_samples(samples: str | Path | None, verify: str) -> None:
    """Refuse samples that are no file, or that a verification does not read.

    Args:
        samples: The file; None for none.
        verify: How much is compared.

    Raises:
        UsageError: They are.
    """
    if samples is None:
        return
    if verify != "full":
        raise UsageError(
            f"samples are read by a full verification, and verify is {verify!r}",
            next_step="leave one of them out",
        )
    if not Path(samples).expanduser().is_file():
        raise UsageError(
            f"samples={str(samples)!r} is no file",
            expected="a text file in UTF-8",
            next_step=meant(samples, "name a file, or leave it out"),
        )


HELP: dict[str, str] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(ExportOptions, include_extras=True).items()
    if get_origin(hint) is Annotated
}
"""The sentence that stands at each choice, for the command line."""
