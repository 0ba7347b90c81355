"""A causal language model without weights becomes one graph for prefill and decode.

The model runs once, under `torch.export`, with its attention, norms, rotary embedding, masks and
cache replaced for that time by what emits ONNX Runtime's operators (the other files of this room).
Nothing is looked up by architecture: what is replaced is recognised by what it computes, and what
is not recognised stays as the model wrote it. A model of which the graph would not be true is
refused.

Shape letters: B batch, S new tokens, P past tokens, T tokens of past and present, K key/value
heads, D head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram

from bone_fx.capture.decoder.activations import gelus_as_operators
from bone_fx.capture.decoder.attention_emitter import (
    AttentionEmitter,
    AttentionLayer,
    attention_through,
    why_plain,
)
from bone_fx.capture.decoder.experts import BATCHED, FUSED, OtherRoutingError
from bone_fx.capture.decoder.interface import (
    KeyValueShape,
    axis_names,
    dynamic_shapes,
    example_inputs,
    input_names,
    output_names,
    shapes_from,
)
from bone_fx.capture.decoder.kv_cache import PassThroughCache
from bone_fx.capture.decoder.last_tokens import head_of_last_tokens
from bone_fx.capture.decoder.lower_program import columns, constant_names, lower, name_constants
from bone_fx.capture.decoder.norms import PLUS_ONE, Derived, norms_as_operators
from bone_fx.capture.decoder.ort_operators import total_length
from bone_fx.capture.decoder.own_attention import (
    OWN_ATTENTION,
    ConcatenatingCache,
    compute_bfloat16_in_float32,
)
from bone_fx.capture.decoder.pasts import Pasts, SharedPasts
from bone_fx.capture.decoder.rotary.watcher import RotaryWatcher
from bone_fx.capture.decoder.stamping.layers import equal_layers_once
from bone_fx.capture.trace.replacements import (
    evaluating,
    forward_replaced,
    graphs_compiled_when_called,
    without_remarks,
)
from bone_fx.collector import old_objects_left_alone
from bone_fx.errors import BoneFxError, CaptureError, first_line


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


class _OtherCacheShapeError(Exception):
    """The model's keys and values have other shapes than its configuration made us expect."""

    def __init__(self, shapes: list[KeyValueShape]) -> None:
        super().__init__(f"cache shapes {shapes}")
        self.shapes = shapes


class _OwnAttentionError(Exception):
    """The model attends without transformers' attention interface: another trace is needed."""


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
    horizon = context_length or getattr(text_config, "max_position_embeddings", None)
    shapes = shapes_from(text_config)
    experts = FUSED
    own = False
    for _ in range(6):
        choices = _Choices(unfused, stamp, last_token_logits, experts, own)
        try:
            with old_objects_left_alone():
                return _Capture(model, text_config, horizon, shapes, choices).run()
        except _OtherCacheShapeError as other:
            shapes = other.shapes
        except OtherRoutingError:
            experts = BATCHED
        except _OwnAttentionError:
            own = True
            unfused = unfused or OWN_ATTENTION
    raise CaptureError(
        "the shapes of the key/value cache depend on the cache",
        found=str(shapes[:4]),
    )


@dataclass(frozen=True)
class _Choices:
    """What `capture_decoder` was told, and what earlier attempts found out.

    Attributes:
        experts: transformers' name of how mixtures of experts are written.
        own: Whether the model attends by itself and does not ask transformers.
    """

    unfused: str | None
    stamp: bool
    last_token_logits: bool
    experts: str
    own: bool


class _Capture:
    """One attempt, for one guess of the cache's shapes."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        horizon: int | None,
        shapes: list[KeyValueShape],
        choices: _Choices,
    ) -> None:
        self.model = model
        self.config = config
        self.choices = choices
        stamp = choices.stamp
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.shapes = shapes
        self.horizon = horizon or int(getattr(config, "n_positions", 0)) or 1 << 15
        self.limited = horizon is not None
        self.inputs = list(dict.fromkeys(shapes)) if stamp else shapes
        self.of = [self.inputs.index(shape) for shape in shapes] if stamp else [*range(len(shapes))]
        self.shared = stamp
        self.own = choices.own
        self.plain = choices.unfused is not None or any(
            why_plain(key, value) for _, key, value in shapes
        )
        self.emitter_of: dict[str, AttentionEmitter] = {}
        self.derived: dict[str, str] = {}
        self.last_B: dict[str, Tensor] = {}
        self.norms = 0

    def run(self) -> DecoderCapture:
        watcher = RotaryWatcher(self.model, self.horizon, self.dtype)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.model))
            self.norms = stack.enter_context(norms_as_operators(self.model, self.derived))
            stack.enter_context(gelus_as_operators(self.model))
            stack.enter_context(watcher.watching())
            stack.enter_context(
                attention_through(
                    self.emitter_of,
                    self.model,
                    self.horizon,
                    self.choices.experts,
                    own=self.own,
                )
            )
            if self.choices.last_token_logits:
                stack.enter_context(head_of_last_tokens(self.model, self.last_B))
            if self.choices.stamp:
                layers_once = equal_layers_once(
                    self.model, len(self.shapes), self.emitter_of, {PLUS_ONE}
                )
                stack.enter_context(layers_once)
            stack.enter_context(forward_replaced(self.model, self._forward(watcher)))
            program = self._export()
        if self.own and self.dtype != torch.bfloat16:
            compute_bfloat16_in_float32(program.graph)
        constants = name_constants(program, watcher.tables)
        traced = self.emitter_of["now"].cache.traced()
        lower(program, SharedPasts(self.of, traced) if self.shared else None)
        constants = {k: v for k, v in constants.items() if k in constant_names(program)}
        layers = sorted(self.emitter_of["now"].layers, key=lambda layer: layer.layer)
        return DecoderCapture(
            program=program,
            input_names=input_names(len(self.shapes)),
            output_names=output_names(len(self.shapes)),
            axis_names=axis_names(
                len(self.shapes), last_token_logits=self.choices.last_token_logits
            ),
            constants=constants,
            derived={
                name: Derived(source, "add_one")
                for name, source in self.derived.items()
                if name in constant_names(program)
            },
            layers=layers,
            dtype=self.dtype,
            context_length=self.horizon if self.limited else None,
            vocab_size=columns(program),
            share_buffer=not self.plain,
            norms=self.norms,
            notes=sorted({*watcher.notes, *(layer.plain for layer in layers if layer.plain)}),
        )

    def _forward(self, watcher: RotaryWatcher) -> Callable[..., tuple[Tensor, ...]]:
        model_forward = self.model.forward
        accepts = inspect.signature(model_forward).parameters
        takes_positions = "position_ids" in accepts

        def forward(
            input_ids: Tensor, attention_mask: Tensor, past_key_values: list[Tensor]
        ) -> tuple[Tensor, ...]:
            tokens = input_ids.shape[1]
            if self.plain:
                torch._check(  # type: ignore[no-untyped-call]  # PyTorch has no types for it
                    past_key_values[0].shape[2] + tokens == attention_mask.shape[1]
                )
            for past in past_key_values:  # layers that are not traced do not say so
                for axis in (0, 2):
                    torch._check(  # type: ignore[no-untyped-call]  # PyTorch has no types for it
                        past.shape[axis] == past_key_values[0].shape[axis]
                    )
            valid_B = attention_mask.sum(1)
            lengths = ((valid_B - 1).to(torch.int32), total_length(attention_mask))
            before_B = (valid_B - tokens).clamp(min=0)
            positions = torch.arange(tokens)[None, :] + before_B[:, None]
            pairs = list(zip(past_key_values[::2], past_key_values[1::2], strict=True))
            pasts = Pasts(pairs, self.of, shared=self.shared)
            total = attention_mask.shape[1]
            cache = PassThroughCache(pasts, query_offset=total - tokens, total=total)
            emitter = AttentionEmitter(cache, attention_mask, lengths, self.choices.unfused)
            self.last_B["now"] = valid_B - before_B - 1
            if self.own:
                cache = emitter.cache = ConcatenatingCache(
                    pasts,
                    query_offset=total - tokens,
                    total=total,
                    heads=int(self.config.num_attention_heads),
                    layers=emitter.layers,
                )
            self.emitter_of["now"] = emitter
            watcher.begin(positions, (lengths[1], total))
            output = model_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **({"position_ids": positions} if takes_positions else {}),
            )
            presents = cache.finish()
            self._check_shapes(emitter.layers)
            return (output.logits, *(t for pair in presents for t in pair))

        return forward

    def _check_shapes(self, layers: list[AttentionLayer]) -> None:
        found = [
            (a.kv_heads, a.key_size, a.value_size) for a in sorted(layers, key=lambda a: a.layer)
        ]
        if found != self.shapes:
            raise _OtherCacheShapeError(found)

    def _export(self) -> ExportedProgram:
        mode = detect_fake_mode(list(self.model.parameters()))
        arguments = example_inputs(self.inputs, self.dtype, mode)
        shapes = dynamic_shapes(len(self.inputs), self.horizon, related=self.plain)
        try:
            with without_remarks(), graphs_compiled_when_called():
                return torch.export.export(
                    self.model, (), arguments, dynamic_shapes=shapes, strict=False
                )
        except _OtherCacheShapeError:
            raise
        except Exception as error:  # whatever a model's own code may raise
            emitter = self.emitter_of.get("now")
            if not self.own and emitter is not None and not emitter.called:
                raise _OwnAttentionError from error
            if isinstance(error, BoneFxError):
                raise
            if "now" in self.emitter_of:
                self.emitter_of["now"].cache.refuse_waiting()
            name = type(self.model).__name__
            raise CaptureError(
                f"{name} cannot be captured as a decoder: {first_line(error)}",
                expected="a forward without decisions that depend on the data",
            ) from error
