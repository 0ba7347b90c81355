"""What an export is made of before it is written: an ONNX model over recipes, and how to verify it.

A checkpoint becomes a `CheckpointBuild`, captured as a decoder with a cache if it generates, else
by its forward; a module of the user's own becomes a `ModuleBuild`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bone_fx.checkpoint import AdapterFolder
from bone_fx.errors import CaptureError, UsageError
from bone_fx.onnx.torch_exporter import OPSET
from bone_fx.onnx.translate import translate
from bone_fx.onnx.writer import write_model
from bone_fx.progress import Progress
from bone_fx.sites import LinearSite
from bone_fx.verify.parity import Parity
from bone_fx.weights.recipes import Converted, Recipe, Value

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bone_fx.capture.deployment import DecoderCapture
    from bone_fx.capture.loading import BaseCheckpoint

Adapters = Sequence[tuple[str, AdapterFolder]]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass
class Build:
    """An export before it is written.

    Attributes:
        model: The ONNX model; its constants are recipes.
        kind: `"decoder"`, `"model"` or `"module"`.
        architecture: Class name of what was captured.
        dtype: Dtype of weights and activations.
        base_name: Name of the base, without its path.
        base_files: SHA-256 of the base's weight files by name.
        notes: What a person should know.
    """

    model: ir.Model
    kind: str
    architecture: str
    dtype: str
    base_name: str = ""
    base_files: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    opset: int = OPSET

    def write(self, folder: Path, told: Progress) -> None:
        """Write the model, and what stands beside it, into a folder."""
        write_model(self.model, folder, told.advance)

    def verify(self, folder: Path, provider: str, mode: str) -> Parity:
        """Compare the written model with torch.

        Raises:
            VerificationError: They disagree.
        """
        raise AssertionError(f"{type(self).__name__} has no verification")


@dataclass
class CheckpointBuild(Build):
    """A checkpoint under its adapters."""

    provider: str = "cpu"
    checkpoint: BaseCheckpoint | None = None
    plan: Plan | None = None
    decoder: DecoderCapture | None = None
    examples: Mapping[str, Tensor] = field(default_factory=dict)

    def write(self, folder: Path, told: Progress) -> None:
        """Write the model; for a decoder also what onnxruntime-genai needs to run the folder."""
        super().write(folder, told)
        assert self.checkpoint is not None
        if self.decoder is not None:
            from bone_fx.onnx.genai_config import write_genai_folder

            self.notes += write_genai_folder(
                folder,
                self.checkpoint.config,
                self.decoder,
                self.checkpoint.folder,
                provider=self.provider,
            )
        else:
            from bone_fx.capture.real_model import copy_config_and_tokenizer

            self.notes += copy_config_and_tokenizer(
                self.checkpoint, self.plan.overrides if self.plan else {}, folder
            )

    def verify(self, folder: Path, provider: str, mode: str) -> Parity:
        """Compare the written model with the base under its adapters, unmerged and folded."""
        from bone_fx.capture.real_model import load_model
        from bone_fx.runtime.session import open_session
        from bone_fx.verify.constants import verify_constants
        from bone_fx.verify.decoder import verify_decoder
        from bone_fx.verify.forward import verify_model

        assert self.checkpoint is not None
        assert self.plan is not None
        plan = self.plan
        model = load_model(self.checkpoint, plan.architecture, plan.overrides, plan.heads)
        verify_constants(folder, model, plan.sites, plan.adapters)
        session = open_session(folder / "model.onnx", provider)
        if self.decoder is not None:
            vocab = int(self.checkpoint.config.get_text_config().vocab_size)
            return verify_decoder(
                session,
                model,
                plan.sites,
                plan.adapters,
                dtype=self.dtype,
                vocab_size=vocab,
                context_length=self.decoder.context_length,
                short=mode == "fast",
            )
        return verify_model(
            session, model, plan.sites, plan.adapters, dict(self.examples), dtype=self.dtype
        )


@dataclass
class ModuleBuild(Build):
    """A module, graph or program of the user's own."""

    call: Callable[..., Any] | None = None
    example: Any = ()

    def verify(self, folder: Path, provider: str, mode: str) -> Parity:
        """Compare the written model with the module, on the example and on other batch sizes."""
        from bone_fx.runtime.session import open_session
        from bone_fx.verify.forward import verify_module

        assert self.call is not None
        session = open_session(folder / "model.onnx", provider)
        return verify_module(session, self.call, self.example, dtype=self.dtype)


@dataclass(frozen=True)
class Plan:
    """Which class a checkpoint and its adapters make, and where the adapters sit.

    Attributes:
        architecture: The model's class.
        overrides: Fields of the configuration that the adapter's head decides.
        heads: Parameters that come from the adapters.
        adapters: The adapters in order.
        sites: The adapted sites by name.
    """

    architecture: type[PreTrainedModel]
    overrides: dict[str, Any]
    heads: dict[str, Tensor]
    adapters: Adapters
    sites: dict[str, LinearSite]


def build_checkpoint(
    base: str | Path,
    adapters: Adapters,
    dtype: str,
    provider: str,
    trust_remote_code: bool,
    revision: str | None,
    told: Progress,
) -> CheckpointBuild:
    """Capture a checkpoint without its weights and fold the adapters into its recipes."""
    from bone_fx.capture.loading import open_base, skeleton
    from bone_fx.weights.checkpoint import recipes_for
    from bone_fx.weights.fold import fold_recipes

    checkpoint = open_base(base, trust_remote_code=trust_remote_code, revision=revision)
    architecture, overrides, heads = _heads_and_class(checkpoint, adapters)
    told.stage("capture without weights")
    model = skeleton(
        checkpoint, DTYPES[dtype], architecture=architecture, config_overrides=overrides
    )
    sites = _adapted_sites(model, adapters)
    plan = Plan(architecture, overrides, heads, adapters, sites)
    recipes = recipes_for(model, checkpoint, extra=heads)
    recipes = fold_recipes(recipes, sites, adapters)
    common = {
        "architecture": architecture.__name__,
        "dtype": dtype,
        "provider": provider,
        "base_name": Path(checkpoint.origin).name,
        "base_files": {file.name: checkpoint.sha256(file) for file in checkpoint.files},
        "checkpoint": checkpoint,
        "plan": plan,
    }
    if _generates(model):
        return _build_decoder(model, recipes, common, told)
    return _build_forward(model, recipes, common, told)


def _build_decoder(
    model: PreTrainedModel, recipes: Mapping[str, Recipe], common: dict[str, Any], told: Progress
) -> CheckpointBuild:
    from bone_fx.capture.deployment import capture_decoder

    capture = capture_decoder(model)
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
    if common["provider"] == "cuda" and common["dtype"] == "fp32":
        notes.append("GroupQueryAttention has no fp32 kernel on CUDA and runs on the CPU: use fp16")
    return CheckpointBuild(translated, "decoder", decoder=capture, notes=notes, **common)


def _derived(source: Recipe, function: str) -> Recipe:
    """The recipe of a constant that is computed from one parameter, in float32, rounded once."""
    compute = {"add_one": lambda tensors: (tensors[0].float() + 1).to(tensors[0].dtype)}[function]
    return Converted((source,), compute, source.shape, function.replace("_", " "))


def _build_forward(
    model: PreTrainedModel, recipes: Mapping[str, Recipe], common: dict[str, Any], told: Progress
) -> CheckpointBuild:
    from bone_fx.capture.default_inputs import default_inputs
    from bone_fx.capture.forward import capture_forward
    from bone_fx.onnx.forward_model import forward_model

    capture = capture_forward(model, default_inputs(model))
    told.stage("translate to ONNX")
    translated = forward_model(capture, recipes)
    return CheckpointBuild(
        translated, "model", examples=_random_inputs(model), notes=list(capture.notes), **common
    )


def _random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Example inputs for verification.

    Token ids over the whole vocabulary, floats from a normal distribution.
    """
    from bone_fx.capture.default_inputs import default_inputs

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


def build_module(
    base: object, example_inputs: Any, dynamic_shapes: Any, told: Progress
) -> ModuleBuild:
    """Capture a module, graph or program of the user's own with the weights it has."""
    from bone_fx.adapted import AdaptedModule
    from bone_fx.capture.forward import capture_forward
    from bone_fx.onnx.forward_model import forward_model

    told.stage("capture")
    if isinstance(base, AdaptedModule):
        base = base.fold()
    if not isinstance(base, nn.Module | ExportedProgram):
        raise UsageError(
            f"cannot export a {type(base).__name__}",
            expected="a path, a module or an ExportedProgram",
        )
    if isinstance(base, ExportedProgram) and example_inputs is None:
        example_inputs = (
            base.example_inputs[1] or base.example_inputs[0] if base.example_inputs else ()
        )
    capture = capture_forward(base, example_inputs, dynamic_shapes=dynamic_shapes)
    told.stage("translate to ONNX")
    translated = forward_model(capture)
    return ModuleBuild(
        translated,
        "module",
        architecture=type(base).__name__,
        dtype=_dtype_of(translated),
        base_name=type(base).__name__,
        notes=list(capture.notes),
        call=_evaluated(base.module() if isinstance(base, ExportedProgram) else base),
        example=example_inputs,
    )


def _evaluated(module: nn.Module) -> Callable[..., Any]:
    """The module's call in evaluation mode; its buffers and its inputs are as before afterwards.

    A graph is called without the guards of its trace, which hold for the sizes of its examples.
    """
    from bone_fx.capture.forward import evaluation_copy

    called = evaluation_copy(module) if isinstance(module, fx.GraphModule) else module

    def call(*args: Any, **kwargs: Any) -> Any:
        training = called.training
        before = [(buffer, buffer.clone()) for buffer in called.buffers()]
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        nn.Module.train(called, False)
        try:
            return called(*args, **kwargs)
        finally:
            nn.Module.train(called, training)
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)

    return call


def _heads_and_class(
    checkpoint: BaseCheckpoint, adapters: Adapters
) -> tuple[type[PreTrainedModel], dict[str, Any], dict[str, Tensor]]:
    """The model class that the adapters' task asks for, and the head that they bring."""
    from bone_fx.capture.loading import architecture_for_task

    heads: dict[str, Tensor] = {}
    tasks = {adapter.config.task_type for _, adapter in adapters if adapter.config.task_type}
    for _, adapter in adapters:
        heads.update(adapter.modules_to_save)
    if len(tasks) > 1:
        raise CaptureError(
            f"the adapters were trained for different tasks: {', '.join(sorted(tasks))}"
        )
    task = next(iter(tasks), None)
    names = checkpoint.config.architectures
    generates = (
        task == "CAUSAL_LM"
        and bool(names)
        and checkpoint.architecture.__name__.endswith(("CausalLM", "LMHeadModel"))
    )
    architecture = (
        checkpoint.architecture
        if task is None or generates
        else architecture_for_task(checkpoint, task)
    )
    overrides: dict[str, Any] = {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        head = next(
            (
                t
                for name, t in heads.items()
                if name.endswith(("classifier.weight", "score.weight", "out_proj.weight"))
            ),
            None,
        )
        if head is not None and head.shape[0] != checkpoint.config.num_labels:
            overrides["num_labels"] = int(head.shape[0])
    return architecture, overrides, heads


def _adapted_sites(model: nn.Module, adapters: Adapters) -> dict[str, LinearSite]:
    from bone_fx.adapting import output_layers
    from bone_fx.dialects import find_module_sites

    sites, others = find_module_sites(model)
    chosen: dict[str, LinearSite] = {}
    for _, adapter in adapters:
        left_out = output_layers(model, adapter.config.task_type)
        chosen |= {site.name: site for site in adapter.match(sites, others, left_out)}
    return chosen


def _generates(model: PreTrainedModel) -> bool:
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)


def _dtype_of(model: ir.Model) -> str:
    kinds = {value.dtype for value in model.graph.inputs} | {
        v.dtype for v in model.graph.initializers.values()
    }
    return "fp16" if ir.DataType.FLOAT16 in kinds else "fp32"
