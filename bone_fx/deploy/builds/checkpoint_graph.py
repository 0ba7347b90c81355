"""A checkpoint's graph: a decoder with a cache if the model generates, else its forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from bone_fx.deploy.checkpoint_inputs import FoldedCheckpoint
from bone_fx.deploy.options import FLOAT_CACHE, NO_CALIBRATION, ExportOptions
from bone_fx.errors import UsageError
from bone_fx.onnx.translate import translate
from bone_fx.progress import Progress
from bone_fx.weights.recipes.recipe import Cast, Converted, Recipe, Value, cast

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from transformers import PreTrainedModel

    from bone_fx.capture.decoder.capture_decoder import DecoderCapture
    from bone_fx.capture.decoder.norms import Derived

RIGHT_PADDING = (
    "batches are padded on the right: with padding on the left the outputs are wrong, so set "
    'tokenizer.padding_side = "right"'
)
NO_FP32_KERNEL = "GroupQueryAttention has no fp32 kernel on CUDA: attention is written out"


@dataclass(frozen=True)
class DecoderGraph:
    """One graph for prefill and decode, with the cache as inputs and outputs.

    Attributes:
        model: The ONNX model; its constants are recipes.
        capture: What it was translated from.
        notes: What a person should know.
    """

    model: ir.Model
    capture: DecoderCapture
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ForwardGraph:
    """A model's forward, without a cache.

    Attributes:
        model: The ONNX model; its constants are recipes.
        examples: Inputs that verification starts from, by name.
        notes: What a person should know.
    """

    model: ir.Model
    examples: dict[str, Tensor]
    notes: tuple[str, ...]


def capture_graph(
    folded: FoldedCheckpoint, options: ExportOptions, progress: Progress
) -> DecoderGraph | ForwardGraph:
    """Capture a model without weights and translate it to ONNX over its recipes.

    Raises:
        CaptureError: The model cannot be captured, or the graph would not be true.
        UsageError: What only a decoder has is asked of a model that is none.
    """
    if _generates(folded.skeleton.model):
        return _capture_decoder(folded, options, progress)
    for name in ("last_token_logits", "cuda_graph", "kv_cache", "calibration"):
        if getattr(options, name) not in (None, False, FLOAT_CACHE, NO_CALIBRATION):
            raise UsageError(
                f"{name} is for decoders, and {folded.inputs.architecture.__name__} is none",
                next_step="export without it",
            )
    return _capture_forward(folded, options, progress)


def _capture_decoder(
    folded: FoldedCheckpoint, options: ExportOptions, progress: Progress
) -> DecoderGraph:
    from bone_fx.capture.decoder.capture_decoder import capture_decoder

    cuda = options.provider == "cuda"
    capture = capture_decoder(
        folded.skeleton.model,
        unfused=NO_FP32_KERNEL if cuda and options.activation_dtype == "fp32" else None,
        last_token_logits=options.last_token_logits,
    )
    progress.stage("translate to ONNX")
    computed = {name: Value(value, "computed") for name, value in capture.constants.items()}
    derived = {
        name: _derived(folded.recipes[constant.source], constant)
        for name, constant in capture.derived.items()
    }
    model = translate(
        capture.program,
        {**folded.recipes, **computed, **derived},
        input_names=capture.input_names,
        output_names=capture.output_names,
        dim_names=capture.axis_names,
    )
    tokens = torch.zeros(2, 7, dtype=torch.long)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    left_out = _left_out(folded.skeleton.model, capture.program, inputs)
    written_out = bool(capture.layers) and all(layer.plain for layer in capture.layers)
    padding = () if written_out else (RIGHT_PADDING,)
    return DecoderGraph(model, capture, (*capture.notes, *padding, *left_out))


def _derived(source: Recipe, constant: Derived) -> Recipe:
    """The recipe of a constant that is computed from one parameter, in float32, rounded once."""
    compute = {"add_one": lambda tensors: tensors[0] + 1}[constant.function]
    exact = source.recipe if isinstance(source, Cast) else source
    in_float32 = cast(exact, torch.float32)
    label = constant.function.replace("_", " ")
    return cast(Converted((in_float32,), compute, source.shape, label), constant.dtype)


def _capture_forward(
    folded: FoldedCheckpoint, options: ExportOptions, progress: Progress
) -> ForwardGraph:
    from bone_fx.capture.forward import capture_forward
    from bone_fx.capture.trace.default_inputs import default_inputs
    from bone_fx.deploy.builds.forward_model import forward_model

    model = folded.skeleton.model
    capture = capture_forward(model, default_inputs(model))
    progress.stage("translate to ONNX")
    translated = forward_model(capture, folded.recipes, skip_norms=options.provider == "cuda")
    left_out = _left_out(model, capture.program, default_inputs(model))
    return ForwardGraph(translated, random_inputs(model), (*capture.notes, *left_out))


def _left_out(
    model: PreTrainedModel, program: ExportedProgram, inputs: Mapping[str, Tensor]
) -> list[str]:
    """Notes on the model's arguments that a graph has not, and on modules that it leaves out."""
    from bone_fx.capture.other_arguments import modules_without_use, other_arguments

    names = other_arguments(model, inputs)
    has_lengths = next(iter(inputs.values())).dim() < 4  # else these are images
    pads = has_lengths and "attention_mask" in names
    used = [s.target for s in program.graph_signature.input_specs if s.target is not None]
    modules = modules_without_use(model, used)
    notes = []
    if names:
        several = len(names) > 1
        notes.append(
            f"{', '.join(names)} {'are' if several else 'is'} not among the graph's inputs: it "
            f"computes what the model computes without {'them' if several else 'it'}"
            f"{', so rows of a batch must not be padded' if pads else ''}"
        )
    if modules:
        notes.append(f"not part of the graph: {', '.join(modules)}")
    return notes


def random_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Example inputs for verification.

    Token ids over the whole vocabulary, floats from a normal distribution.
    """
    from bone_fx.capture.trace.config_sizes import size_in
    from bone_fx.capture.trace.default_inputs import default_inputs

    generator = torch.Generator().manual_seed(0)
    vocabulary = size_in(model.config.get_text_config(), "vocab_size") or 2
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
