"""The verification of an export of a checkpoint: right after it was written, or later.

1. transformers loads the reference, and `verify.unmerged.peft_layout` reads the adapters. A
   reference that is large beside the available memory is streamed (`base.streamed_model`), and that
   is recorded.
2. Every constant of the graph is compared with the reference's parameters, and the tables of
   positions with its rotary modules (`verify.constants`, `verify.rotary_tables`).
3. The graph is run beside the reference (`verify.decoder.compare_decoder`,
   `verify.compare_forward`).
4. `config.json` is compared with the reference's configuration (`verify.configuration`); what
   else stands beside a decoder's graph with the base and the adapters, and onnxruntime-genai
   generates with it (`verify.decoder.genai_folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from bone_fx.deploy.checkpoint_inputs import TORCH_DTYPES, CheckpointInputs
from bone_fx.errors import InputRefusedError, UsageError
from bone_fx.onnx.writer import MODEL_FILE, write_model
from bone_fx.verify.parity import Parity

_TEXT_TOKENS = 256
_LETTERS = 16
"""Letters of a text for each token that is wanted of it: more than a token has on average."""
_SAMPLE, _SAMPLES = 256, 8
"""Tokens of a piece of the samples, and pieces that are run."""
NOT_ON_THE_CPU = "no CPU kernel for a cache in fp8: a twin with a cache of rounded floats was run"
_STREAMED = (
    "the reference had no room in memory: its weights were streamed through the exporter's own"
    " reader, which a comparison on a larger machine would leave out"
)


@dataclass(frozen=True)
class Exported:
    """An export as verification meets it.

    Attributes:
        path: The graph, in its folder.
        activations: Dtype of the activations.
        accuracy_level: What products with quantized weights say of their activations, as
            `MatMulNBits` takes it; None where no weight is quantized.
        examples: Inputs by name of a graph without a cache; None for a decoder.
        tokenizer: The folder that the tokenizer comes from.
        twin: The graph in fp32 with weights rounded to bf16, where bf16 has no kernels.
        opened: Name of the graph that `genai_config.json` opens; None for this one.
    """

    path: Path
    activations: str
    accuracy_level: int | None
    examples: Mapping[str, Tensor] | None
    tokenizer: Path
    twin: ir.Model | None = None
    opened: str | None = None


def verify_checkpoint(
    exported: Exported,
    inputs: CheckpointInputs,
    provider: str,
    level: str,
    samples: str | Path | None = None,
    memory: int | None = None,
) -> Parity:
    """Compare an export with the base under its adapters, unmerged and folded.

    Args:
        exported: The export.
        inputs: The base and the adapters.
        provider: ONNX Runtime's provider to run it on, `"cpu"` or `"cuda"`.
        level: `"full"` or `"fast"`.
        samples: A text whose likelihood is measured.
        memory: Bytes that can be used; None asks the system.

    Raises:
        VerificationError: They disagree.
        UsageError: There are samples and no decoder, or no tokenizer.
    """
    from bone_fx.base.real_model import load_model, room_for
    from bone_fx.base.sizes.memory import available_memory
    from bone_fx.verify.cases import vocabulary_of
    from bone_fx.verify.compare_forward import verify_model
    from bone_fx.verify.compare_quantized import RoundedWeights, Written
    from bone_fx.verify.configuration import verify_configuration
    from bone_fx.verify.constants import verify_constants
    from bone_fx.verify.decoder.compare_decoder import DecoderChecks, verify_decoder
    from bone_fx.verify.decoder.genai_folder import (
        load_tokenizer,
        verify_genai_folder,
        verify_generation,
    )
    from bone_fx.verify.decoder.quantized_cache import QuantizedCache, runnable
    from bone_fx.verify.graph import WrittenGraph
    from bone_fx.verify.rotary_tables import verify_rotary_tables
    from bone_fx.verify.unmerged.peft_layout import PeftAdapter

    short, tokenizer_of = level == "fast", cache(load_tokenizer)
    texts = () if samples is None else _sample_texts(exported, inputs, Path(samples))
    room = room_for(inputs.checkpoint, available_memory() if memory is None else memory)
    model: Any = load_model(
        inputs.checkpoint, inputs.architecture, inputs.overrides, inputs.heads, inputs.untied, room
    )
    adapters = [PeftAdapter.read(each.path, each.given_up, model) for _, each in inputs.adapters]
    compared = verify_constants(exported.path, model, adapters, TORCH_DTYPES[exported.activations])
    tables = verify_rotary_tables(exported.path, model, compared.others)
    config = inputs.config.get_text_config()
    written: Written | None = None
    dtype = exported.activations
    if exported.twin is not None:
        written, dtype = RoundedWeights(exported.path), "fp32"
    elif exported.accuracy_level is not None:
        written = Written(exported.path, exported.accuracy_level)
    with _runnable(exported) as path:
        if exported.examples is not None:
            parity = verify_model(
                WrittenGraph(path, provider),
                model,
                adapters,
                dict(exported.examples),
                dtype=dtype,
                short=short,
                written=written,
            )
        else:
            checks = DecoderChecks(
                dtype=dtype,
                vocab_size=vocabulary_of(model),
                context_length=getattr(config, "max_position_embeddings", None),
                short=short,
                text=() if short else _real_text(config, exported.tokenizer, tokenizer_of),
                samples=texts,
            )
            parity = verify_decoder(runnable(path, provider), model, adapters, checks, written)
    kept = None if exported.examples is not None else QuantizedCache.of(exported.path)
    named = {*tables, *(() if kept is None else kept.constants)}
    unnamed = [name for name in compared.others if name not in named]
    if room is not None:
        parity.reference = "streamed"
        parity.warnings.append(_STREAMED)
    parity.add_constants(len(compared.parameters) + len(tables), unnamed)
    activations = str(TORCH_DTYPES[exported.activations]).removeprefix("torch.")
    name = inputs.architecture.__name__
    common = exported.opened is not None
    place = exported.path.parent
    verify_configuration(parity, place, inputs.config, name, activations, common=common)
    if exported.examples is None:
        graph = runnable(exported.path, provider)
        folders = [adapter.folder for adapter in adapters]
        verify_genai_folder(
            parity,
            graph,
            inputs.config,
            inputs.checkpoint.folder,
            folders,
            tokenizer_of,
            opened=exported.opened,
        )
        if graph.edits:
            parity.skip(exported.path.name, NOT_ON_THE_CPU)
        elif not short and provider == "cpu" and exported.twin is None:
            verify_generation(parity, graph)
    return parity


@contextmanager
def _runnable(exported: Exported) -> Iterator[Path]:
    """The model file to run: the export's, or its twin's for as long as the context is open."""
    if exported.twin is None:
        yield exported.path
        return
    with TemporaryDirectory(dir=exported.path.parent.parent) as beside:
        write_model(exported.twin, Path(beside))
        yield Path(beside) / MODEL_FILE


def _real_text(config: Any, folder: Path, tokenizer_of: Callable[[Path], Any]) -> tuple[int, ...]:
    """Token ids of the built-in text's start; none where a folder has no tokenizer that fits."""
    from bone_fx.base.calibration import TOKENIZER_FILES, built_in_text

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return ()
    try:
        ids = tokenizer_of(folder)(built_in_text().content[: _TEXT_TOKENS * _LETTERS])["input_ids"]
    except InputRefusedError:
        return ()
    if len(ids) < 2 or max(ids) >= int(getattr(config, "vocab_size", None) or max(ids) + 1):
        return ()
    most = getattr(config, "max_position_embeddings", None)
    return tuple(ids[: min(_TEXT_TOKENS, int(most or _TEXT_TOKENS))])


def _sample_texts(
    exported: Exported, inputs: CheckpointInputs, path: Path
) -> tuple[tuple[int, ...], ...]:
    """Token ids of a text, in pieces that a decoder takes."""
    from bone_fx.base.calibration import CalibrationError, Text, token_ids

    if exported.examples is not None:
        raise UsageError(
            "samples are for decoders", next_step="leave them out: there is no next token"
        )
    try:
        text = Text(path.name, path.expanduser().read_text(encoding="utf-8"))
        ids = token_ids(inputs.checkpoint, text, exported.tokenizer)[: _SAMPLE * _SAMPLES]
    except (OSError, UnicodeDecodeError, CalibrationError) as error:
        raise UsageError(
            f"{path} cannot be read as samples",
            expected="a text file in UTF-8, and a tokenizer",
            found=str(error),
            next_step="name another file, or leave the samples out",
        ) from error
    most = getattr(inputs.config.get_text_config(), "max_position_embeddings", None)
    pieces = torch.split(ids, min(_SAMPLE, int(most or _SAMPLE)))
    return tuple(tuple(piece.tolist()) for piece in pieces if len(piece) > 1)
