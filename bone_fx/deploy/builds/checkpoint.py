"""A checkpoint under its adapters: a decoder with a cache if it generates, else its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bone_fx.deploy.builds.base import Build
from bone_fx.deploy.builds.calibrate import OFF, Calibration, calibrate
from bone_fx.deploy.builds.options import DTYPES, BuildOptions
from bone_fx.deploy.builds.plan import Adapters, Plan, adapted_sites, heads_and_class
from bone_fx.errors import UsageError
from bone_fx.onnx.quantize import QuantizeWeights
from bone_fx.onnx.translate import translate
from bone_fx.onnx.writer import write_model
from bone_fx.progress import Progress
from bone_fx.verify.parity import Parity
from bone_fx.weights.recipes.nbits import Scheme
from bone_fx.weights.recipes.recipe import Converted, Recipe, Value, rounded
from bone_fx.weights.recipes.rounding import Rounding

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from transformers import PreTrainedModel

    from bone_fx.base.loading import BaseCheckpoint
    from bone_fx.capture.decoder.capture_decoder import DecoderCapture

NO_FP32_KERNEL = "GroupQueryAttention has no fp32 kernel on CUDA: attention is written out"
NO_BIAS = "GroupQueryAttention takes no bias on CUDA: attention is written out"


@dataclass
class CheckpointBuild(Build):
    """A checkpoint under its adapters."""

    provider: str = "cpu"
    checkpoint: BaseCheckpoint | None = None
    plan: Plan | None = None
    decoder: DecoderCapture | None = None
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    twin: CheckpointBuild | None = None

    def base_files(self) -> dict[str, str]:
        """SHA-256 of the base's weight files by name."""
        assert self.checkpoint is not None
        return self.checkpoint.sha256()

    def write(self, folder: Path, told: Progress) -> None:
        """Write the model; for a decoder also what onnxruntime-genai needs to run the folder."""
        super().write(folder, told)
        self.notes += self.rounding.warnings() if self.rounding is not None else []
        assert self.checkpoint is not None
        if self.decoder is not None:
            from bone_fx.deploy.genai_config import write_genai_folder

            self.notes += write_genai_folder(
                folder,
                self.checkpoint.config,
                self.decoder,
                self.checkpoint.folder,
                provider=self.provider,
            )
        else:
            from bone_fx.base.real_model import copy_config_and_tokenizer

            self.notes += copy_config_and_tokenizer(
                self.checkpoint, self.plan.overrides if self.plan else {}, folder
            )

    def verify(self, folder: Path, provider: str, mode: str) -> Parity:
        """Compare the written model with the base under its adapters, unmerged and folded."""
        from bone_fx.base.real_model import load_model
        from bone_fx.runtime.session import open_session
        from bone_fx.verify.compare_decoder import verify_decoder
        from bone_fx.verify.compare_forward import verify_model
        from bone_fx.verify.compare_quantized import RoundedWeights, Written, written_graph
        from bone_fx.verify.constants import verify_constants

        assert self.checkpoint is not None
        assert self.plan is not None
        plan = self.plan
        model = load_model(self.checkpoint, plan.architecture, plan.overrides, plan.heads)
        verify_constants(folder, model, plan.sites, plan.adapters)
        written: Written | None = None
        if self.twin is not None:
            session = self._twin_session(folder, provider)
            written = RoundedWeights(folder, None)
        else:
            session = open_session(folder / "model.onnx", provider)
        if self.quantization is not None:
            written = written_graph(folder, provider)
        if self.decoder is not None:
            vocab = int(self.checkpoint.config.get_text_config().vocab_size)
            return verify_decoder(
                session,
                model,
                plan.sites,
                plan.adapters,
                dtype="fp32" if self.twin else self.activations,
                vocab_size=vocab,
                context_length=self.decoder.context_length,
                short=mode == "fast",
                written=written,
            )
        return verify_model(
            session,
            model,
            plan.sites,
            plan.adapters,
            dict(self.examples),
            dtype="fp32" if self.twin else self.activations,
            written=written,
        )

    def _twin_session(self, folder: Path, provider: str) -> InferenceSession:
        """A session of the fp32 twin, whose files are gone when this returns."""
        from bone_fx.runtime.session import open_session

        assert self.twin is not None
        with TemporaryDirectory(dir=folder.parent) as beside:
            write_model(self.twin.model, Path(beside))
            return open_session(Path(beside) / "model.onnx", provider)


def build_checkpoint(
    base: str | Path,
    adapters: Adapters,
    options: BuildOptions,
    told: Progress,
) -> CheckpointBuild:
    """Capture a checkpoint without its weights and fold the adapters into its recipes."""
    from bone_fx.base.loading import open_base, skeleton
    from bone_fx.weights.apply_adapters import fold_recipes
    from bone_fx.weights.load_plan import recipes_for

    checkpoint = open_base(
        base, trust_remote_code=options.trust_remote_code, revision=options.revision
    )
    checkpoint.start_hashing()
    architecture, overrides, heads = heads_and_class(checkpoint, adapters)
    told.stage("capture without weights")
    model, load_plan = skeleton(
        checkpoint,
        DTYPES[options.activations],
        architecture=architecture,
        config_overrides=overrides,
    )
    sites = adapted_sites(model, adapters)
    plan = Plan(architecture, overrides, heads, adapters, sites)
    recipes = recipes_for(model, load_plan, checkpoint.tensors, extra=heads)
    narrow = options.quantization is None and options.activations in ("fp16", "bf16")
    rounding = Rounding(DTYPES[options.activations]) if narrow and adapters else None
    recipes = fold_recipes(recipes, sites, adapters, rounding=rounding)
    if options.rounded is not None:
        recipes = rounded(recipes, options.rounded)
    common = {
        "architecture": architecture.__name__,
        "dtype": options.dtype,
        "activations": options.activations,
        "provider": options.provider,
        "base_name": Path(checkpoint.origin).name,
        "checkpoint": checkpoint,
        "plan": plan,
        "rounding": rounding,
    }
    if _generates(model):
        built = _build_decoder(model, recipes, common, options, told)
    elif options.last_token_logits:
        raise UsageError(
            f"last_token_logits is for decoders, and {architecture.__name__} is none",
            next_step="export without it",
        )
    else:
        built = _build_forward(model, recipes, common, told)
    if options.activations == "bf16":
        told.stage("capture the fp32 twin")
        twin = replace(options, dtype="fp32", rounded=torch.bfloat16)
        built.twin = build_checkpoint(base, adapters, twin, told)
        built.notes.append(
            "bf16 has no CPU kernels: verification runs an fp32 twin with the rounded weights"
        )
    if options.quantization is not None:
        _quantize(built, options, recipes, told)
    if options.provider == "cuda" and options.rounded is None:
        other = "--provider cpu" if options.activations == "fp32" else "--dtype fp32"
        built.place_on_cuda(f"export with {other}")
    return built


def _described(scheme: Scheme | None) -> dict[str, Any] | None:
    if scheme is None:
        return None
    return {
        "bits": scheme.bits,
        "block_size": scheme.block_size,
        "symmetric": scheme.symmetric,
    }


def _quantize(
    build: CheckpointBuild, options: BuildOptions, recipes: Mapping[str, Recipe], told: Progress
) -> None:
    """Replace the products of a build by quantized ones, in place."""
    plan = options.quantization
    assert plan is not None
    assert build.checkpoint is not None
    assert build.plan is not None
    calibration = Calibration()
    if build.kind == "decoder" and plan.calibrates and options.calibration != OFF:
        told.stage("calibrate")
        calibration = calibrate(build.checkpoint, build.plan, recipes, options.calibration)
    told.stage("quantize into recipes")
    step = QuantizeWeights(plan, calibration.moments)
    step(build.model)
    build.quantization = {
        "weights": _described(plan.weights),
        "head": _described(plan.head),
        "embeddings": _described(plan.embeddings),
        "accuracy_level": plan.accuracy_level,
        "calibration": calibration.described
        and {
            **calibration.described,
            "products": len(step.done.weighted),
        },
        "products": len(step.done.products),
        "gathered": sorted(step.done.embeddings),
        "kept": step.done.kept,
    }
    build.notes += calibration.notes
    build.notes += [f"{name} is not quantized: {why}" for name, why in step.done.kept.items()]
    if not step.done.products:
        build.notes.append("no product of the graph could be quantized")


def _build_decoder(
    model: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    common: dict[str, Any],
    options: BuildOptions,
    told: Progress,
) -> CheckpointBuild:
    from bone_fx.capture.decoder.capture_decoder import capture_decoder

    cuda = options.provider == "cuda"
    in_fp32 = options.activations == "fp32" and options.rounded is None
    capture = capture_decoder(
        model,
        unfused=NO_FP32_KERNEL if cuda and in_fp32 else None,
        unbiased=NO_BIAS if cuda else None,
        last_token_logits=options.last_token_logits,
    )
    told.stage("translate to ONNX")
    known = {
        **recipes,
        **{name: Value(value, "computed") for name, value in capture.constants.items()},
    }
    for name, derived in capture.derived.items():
        known[name] = _derived(recipes[derived.source], derived.function)
    translated = translate(
        capture.program,
        known,
        input_names=capture.input_names,
        output_names=capture.output_names,
        dim_names=capture.axis_names,
    )
    notes = list(capture.notes)
    return CheckpointBuild(translated, "decoder", decoder=capture, notes=notes, **common)


def _derived(source: Recipe, function: str) -> Recipe:
    """The recipe of a constant that is computed from one parameter, in float32, rounded once."""
    compute = {"add_one": lambda tensors: (tensors[0].float() + 1).to(tensors[0].dtype)}[function]
    return Converted((source,), compute, source.shape, function.replace("_", " "))


def _build_forward(
    model: PreTrainedModel, recipes: Mapping[str, Recipe], common: dict[str, Any], told: Progress
) -> CheckpointBuild:
    from bone_fx.capture.forward import capture_forward
    from bone_fx.capture.trace.default_inputs import default_inputs
    from bone_fx.onnx.forward_model import forward_model

    capture = capture_forward(model, default_inputs(model))
    told.stage("translate to ONNX")
    translated = forward_model(capture, recipes, skip_norms=common["provider"] == "cuda")
    return CheckpointBuild(
        translated, "model", examples=_random_inputs(model), notes=list(capture.notes), **common
    )


def _random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Example inputs for verification.

    Token ids over the whole vocabulary, floats from a normal distribution.
    """
    from bone_fx.capture.trace.default_inputs import default_inputs

    generator = torch.Generator().manual_seed(0)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 2))
    inputs = {}
    for name, value in default_inputs(model).items():
        if value.is_floating_point():
            inputs[name] = torch.randn(value.shape, generator=generator)
        elif name.endswith("input_ids"):
            inputs[name] = torch.randint(0, vocabulary, value.shape, generator=generator)
        else:
            inputs[name] = value
    return inputs


def _generates(model: PreTrainedModel) -> bool:
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)
