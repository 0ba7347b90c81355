"""A causal language model without weights becomes one graph for prefill and decode.

Nothing is looked up by architecture: what is replaced is recognised by what it computes, and what
is not recognised stays as the model wrote it. A model of which the graph would not be true is
refused. The flow:

1. `find_facts` runs the model on a short text and says what a trace has to know beforehand: the
   shapes of the cache, whether the model attends by itself, which layers are equal.
2. A `CaptureSession` replaces attention, masks, norms, activations, rotary embeddings, cache, head
   and repeated layers of the model by what emits ONNX Runtime's operators (its table of
   `replacements` names each, with the reason).
3. `torch.export` traces the model, once. A trace that contradicts the facts is an error.
4. Tables and buffers get names (`name_constants`), the passes of `bone_fx.lower` tighten the graph
   (`lower`), and equal layers are copied from the one that was traced.
5. `DecoderCapture` holds the graph and what its translation and onnxruntime-genai need to know.

Shape letters: B batch, S new tokens, P past tokens, T tokens of past and present, K key/value
heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bone_fx.capture.decoder.attention_emitter import AttentionLayer
from bone_fx.capture.decoder.facts import find_facts
from bone_fx.capture.decoder.interface import axis_names, input_names, output_names
from bone_fx.capture.decoder.lower_program import columns, constant_names, lower, name_constants
from bone_fx.capture.decoder.norms import Derived
from bone_fx.capture.decoder.own_attention import compute_bfloat16_in_float32
from bone_fx.capture.decoder.session import CaptureSession, SessionOptions
from bone_fx.capture.trace.config_sizes import size_in
from bone_fx.collector import old_objects_left_alone
from bone_fx.errors import CaptureError


@dataclass
class DecoderCapture:
    """A decoder as one graph.

    Attributes:
        program: The graph; its parameters are fake where the model's are.
        input_names: Names of the user inputs in order: input_ids, attention_mask,
            past_key_values.0.key, …
        output_names: logits, present.0.key, present.0.value, …
        axis_names: For each input and output, the names of its dynamic axes by position.
        constants: Values of the constants that no checkpoint holds, by their name in the graph
            signature.
        derived: Constants made from a parameter, by their name in the graph signature.
        layers: What the attention of each layer needs.
        dtype: Dtype of weights, cache and logits.
        context_length: Number of positions the graph holds for; None where nothing limits it.
        vocab_size: Columns of the logits.
        share_buffer: Whether past and present may be one buffer (onnxruntime-genai's
            past_present_share_buffer).
        norms: Number of norms emitted as one operator.
        notes: What was not recognised and stayed as the model wrote it.
    """

    program: ExportedProgram
    input_names: list[str]
    output_names: list[str]
    axis_names: dict[str, dict[int, str]]
    constants: dict[str, Tensor]
    derived: dict[str, Derived]
    layers: list[AttentionLayer]
    dtype: torch.dtype
    context_length: int | None
    vocab_size: int
    share_buffer: bool
    norms: int
    notes: list[str] = field(default_factory=list)


def capture_decoder(
    model: nn.Module,
    *,
    context_length: int | None = None,
    unfused: str | None = None,
    stamp: bool = True,
    last_token_logits: bool = False,
) -> DecoderCapture:
    """Captures a transformers causal language model as one graph for prefill and decode.

    Args:
        model: The model in the dtype of the export. Its parameters may be FakeTensors of one
            FakeTensorMode with a ShapeEnv and `allow_non_fake_inputs=True`; its buffers are real.
            It is as it was when this returns.
        context_length: Number of positions of the rotary tables; default: the configuration's
            max_position_embeddings.
        unfused: Why attention is written out in plain operators; None for GroupQueryAttention
            wherever it can be.
        stamp: Trace equal layers once. The graph is the same without, and takes longer.
        last_token_logits: Give the logits of each text's last token only, [B, 1, vocabulary].

    Raises:
        CaptureError: The model cannot be captured, or the graph would not be the model.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise CaptureError(
            f"{type(model).__name__} has no configuration", expected="a transformers causal LM"
        )
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    options = SessionOptions(
        context_length=context_length or size_in(text_config, "max_position_embeddings"),
        unfused=unfused,
        stamp=stamp,
        last_token_logits=last_token_logits,
    )
    with old_objects_left_alone():
        facts = find_facts(model, text_config)
        return _capture(CaptureSession(model, text_config, facts, options))


def _capture(session: CaptureSession) -> DecoderCapture:
    program = session.trace()
    facts, options, layers = session.facts, session.options, session.layers
    if facts.own_attention and session.dtype != torch.bfloat16:
        compute_bfloat16_in_float32(program.graph)
    constants = name_constants(program, session.rotary.tables)
    lower(program, session.shared_pasts())
    used = constant_names(program)
    count = len(facts.shapes)
    return DecoderCapture(
        program=program,
        input_names=input_names(count),
        output_names=output_names(count),
        axis_names=axis_names(count, last_token_logits=options.last_token_logits),
        constants={name: value for name, value in constants.items() if name in used},
        derived={name: value for name, value in session.derived.items() if name in used},
        layers=layers,
        dtype=session.dtype,
        context_length=options.context_length,
        vocab_size=columns(program),
        share_buffer=not session.plain,
        norms=len(session.norms),
        notes=sorted({*session.rotary.notes, *(a.plain for a in layers if a.plain)}),
    )
