"""The export of a checkpoint under its adapters, from what was opened to what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from bone_fx.adapter_folder import Adapters
from bone_fx.deploy.builds.base import Build, Written, cuda_placement, write_graph
from bone_fx.deploy.builds.calibrate import Calibration, calibrate, calibrate_cache
from bone_fx.deploy.builds.checkpoint_graph import DecoderGraph, ForwardGraph, capture_graph
from bone_fx.deploy.builds.kv_cache import NOT_RUN, quantize_cache, require_quantized_cache
from bone_fx.deploy.builds.quantization import QuantizationReport, quantization_of, quantize
from bone_fx.deploy.checkpoint_inputs import (
    TORCH_DTYPES,
    CheckpointInputs,
    FoldedCheckpoint,
    open_checkpoint,
)
from bone_fx.deploy.companions.choice import Companions, choose_companions, hashes_beside_weights
from bone_fx.deploy.companions.configuration import write_configuration
from bone_fx.deploy.companions.copying import copy_companions
from bone_fx.deploy.companions.left_out import files_left_out, sentence_notes
from bone_fx.deploy.companions.sentence_model import copy_sentence_files
from bone_fx.deploy.options import FLOAT_CACHE, FP8_CACHE, NO_CALIBRATION, ExportOptions
from bone_fx.deploy.report.origin import read_origin
from bone_fx.onnx.writer import MODEL_FILE
from bone_fx.progress import Progress
from bone_fx.sites import LinearSite
from bone_fx.verify.parity import Parity
from bone_fx.weights.recipes.change import Change
from bone_fx.weights.recipes.rounding import Rounding

ONE_BEAM = (
    "with CUDA graphs onnxruntime-genai takes num_beams 1, and the cache has max_length positions "
    "from the start"
)
_STATES = "last_hidden_state"
"""The output that sentence-transformers pools."""
_TWIN = "bf16 has no CPU kernels: verification runs an fp32 twin with the rounded weights"


@dataclass(frozen=True)
class CheckpointBuild(Build):
    """A checkpoint under its adapters.

    Attributes:
        inputs: The base and the adapters.
        sites: The adapted sites by name.
        graph: What was captured.
        companions: What goes beside the model.
        provider: What the graph is written for.
        cuda_graph: Whether onnxruntime-genai is told to capture a CUDA graph.
        change: Measures, while weights are written, how far the adapters move each weight.
        rounding: Measures, while weights are written, what the cast to a half dtype costs the
            adapters; None for other exports.
        twin: The same graph in fp32 with the weights rounded to bf16, to verify where there are no
            kernels for bf16; None for other dtypes.
        session_options: What onnxruntime-genai is to open the graph with.
    """

    inputs: CheckpointInputs
    sites: Mapping[str, LinearSite]
    graph: DecoderGraph | ForwardGraph
    companions: Companions
    provider: str
    cuda_graph: bool
    change: Change
    rounding: Rounding | None
    twin: ir.Model | None
    session_options: Mapping[str, str]

    def base_files(self) -> dict[str, str]:
        """SHA-256 of the base's files that were used, by name."""
        return self.inputs.checkpoint.sha256() | hashes_beside_weights(
            self.inputs.checkpoint.folder
        )

    def origin(self) -> dict[str, Any]:
        """Licence and base of the base, as its own files state them."""
        checkpoint = self.inputs.checkpoint
        return read_origin(checkpoint.origin, checkpoint.folder)

    def write(self, folder: Path, progress: Progress) -> Written:
        """Write the model, and what tools open a folder by: genai's files, or transformers'."""
        sha256 = write_graph(self.model, folder, progress)
        notes = self.rounding.warnings() if self.rounding is not None else []
        base = self.inputs.checkpoint
        if isinstance(self.graph, DecoderGraph):
            from bone_fx.deploy.genai_config import write_genai_folder

            notes += write_genai_folder(
                folder,
                base,
                self.graph.capture,
                self.companions,
                provider=self.provider,
                cuda_graph=self.cuda_graph,
                session_options=self.session_options,
            )
        else:
            copy_companions(self.companions, folder)
            if _STATES in {str(value.name) for value in self.model.graph.outputs}:
                copy_sentence_files(base.folder, self.inputs.adapters, folder)
            if not self.companions.tokenizer and not self.companions.processors:
                notes.append("the base folder has no tokenizer; the output has none either")
        write_configuration(
            self.inputs,
            self.companions,
            TORCH_DTYPES[self.activations],
            folder,
            generates=isinstance(self.graph, DecoderGraph),
        )
        report = self.rounding.report() if self.rounding is not None else None
        return Written(sha256, report, self.change.report(), tuple(notes))

    def verify(
        self, folder: Path, provider: str, level: str, samples: str | Path | None = None
    ) -> Parity:
        """Compare the written model with the base under its adapters, unmerged and folded."""
        from bone_fx.deploy.verification import Exported, verify_checkpoint

        graph, of_weights = self.graph, self.quantization
        exported = Exported(
            path=folder / MODEL_FILE,
            activations=self.activations,
            accuracy_level=None if of_weights is None else int(of_weights["accuracy_level"]),
            examples=None if isinstance(graph, DecoderGraph) else graph.examples,
            tokenizer=self.companions.tokenizer_folder,
            twin=self.twin,
        )
        return verify_checkpoint(exported, self.inputs, provider, level, samples)


def build_checkpoint(
    base: str | Path, adapters: Adapters, options: ExportOptions, progress: Progress
) -> CheckpointBuild:
    """Capture a checkpoint without its weights and fold the adapters into its recipes."""
    inputs = open_checkpoint(
        base,
        adapters,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
        allow_unused=options.allow_unused or (),
    )
    companions = choose_companions(inputs.checkpoint.folder, adapters)
    notes = [*companions.notes, *files_left_out(inputs.checkpoint, adapters)]
    progress.stage("capture without weights")
    dtype = TORCH_DTYPES[options.activation_dtype]
    in_halves = dtype.itemsize == 2 and not options.quantizes
    folded = inputs.fold(dtype, Rounding(dtype) if in_halves and adapters else None)
    companions.check_vocabulary(folded.skeleton.model)
    graph = capture_graph(folded, options, progress)
    decodes = isinstance(graph, DecoderGraph)
    notes += sentence_notes(inputs.checkpoint.folder, adapters, decodes=decodes)
    notes += [*folded.notes, *graph.notes]
    twin = None
    if options.activation_dtype == "bf16":
        progress.stage("capture the fp32 twin")
        twin_weights = inputs.fold(torch.float32).rounded_to(torch.bfloat16)
        twin = capture_graph(twin_weights, options, progress).model
        notes.append(_TWIN)
    quantized = kv_cache = None
    text = None if options.calibration == NO_CALIBRATION else options.calibration
    if options.kv_cache != FLOAT_CACHE and isinstance(graph, DecoderGraph):
        progress.stage("measure the cache")
        layers, kept = graph.capture.layers, options.kv_cache
        in_halves = options.activation_dtype == "fp16"
        partners = require_quantized_cache(
            graph.model, layers, options.provider, in_halves=in_halves, dtype=kept
        )
        measured = calibrate_cache(folded, text, companions.tokenizer_folder, partners)
        kv_cache = quantize_cache([graph.model, *([] if twin is None else [twin])], measured, kept)
        notes += [*measured.notes, *([NOT_RUN] if kept == FP8_CACHE else [])]
    if options.quantizes:
        tokenizer = companions.tokenizer_folder
        quantized = _quantize(graph, folded, options, tokenizer, progress)
        notes += quantized.notes
    placement = None
    if options.provider == "cuda":
        other = "--provider cpu" if options.activation_dtype == "fp32" else "--dtype fp32"
        grows = isinstance(graph, DecoderGraph) and not graph.capture.share_buffer
        placement = cuda_placement(graph.model, f"export with {other}", grows=grows)
        if options.cuda_graph:
            placement.require_cuda_graph()
            notes.append(ONE_BEAM)
    return CheckpointBuild(
        model=graph.model,
        kind="decoder" if isinstance(graph, DecoderGraph) else "model",
        architecture=inputs.architecture.__name__,
        base_name=inputs.checkpoint.name,
        dtype=options.weight_dtype,
        activations=options.activation_dtype,
        quantization=None if quantized is None else quantized.entries,
        kv_cache=kv_cache,
        placement=placement,
        notes=tuple(notes),
        inputs=inputs,
        sites=folded.sites,
        graph=graph,
        companions=companions,
        provider=options.provider,
        cuda_graph=bool(options.cuda_graph),
        change=folded.change,
        rounding=folded.rounding,
        twin=twin,
        session_options={} if quantized is None else quantized.session_options,
    )


def _quantize(
    graph: DecoderGraph | ForwardGraph,
    folded: FoldedCheckpoint,
    options: ExportOptions,
    tokenizer: Path,
    progress: Progress,
) -> QuantizationReport:
    """Quantize a graph's products in place; a decoder's 4 bits are chosen on a text."""
    plan = quantization_of(options)
    calibration = Calibration()
    on_text = isinstance(graph, DecoderGraph) and options.calibration != NO_CALIBRATION
    if on_text and plan.calibrates:
        progress.stage("calibrate")
        calibration = calibrate(folded, options.calibration, tokenizer)
    progress.stage("quantize into recipes")
    return quantize(graph.model, plan, calibration, options.provider)
