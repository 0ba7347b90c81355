"""One trace of a decoder: all that is different about the model meanwhile, in one object.

Shape letters: B batch, S new tokens, P past tokens, T tokens of past and present, K key/value
heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram

from bone_fx.capture.decoder.activations import gelus_as_operators
from bone_fx.capture.decoder.attention_emitter import (
    AttentionEmitter,
    AttentionLayer,
    attention_interface,
    why_plain,
)
from bone_fx.capture.decoder.experts import experts_forward, experts_interface
from bone_fx.capture.decoder.facts import ModelFacts, not_captured
from bone_fx.capture.decoder.interface import dynamic_shapes, example_inputs, model_inputs
from bone_fx.capture.decoder.kv_cache import PassThroughCache
from bone_fx.capture.decoder.last_tokens import head_of_last_tokens
from bone_fx.capture.decoder.masks import MaskRecogniser
from bone_fx.capture.decoder.norms import (
    derived_constants,
    norms_as_operators,
    recognise_norms,
)
from bone_fx.capture.decoder.ort_operators import new_tokens, total_length
from bone_fx.capture.decoder.own_attention import (
    OWN_ATTENTION,
    ConcatenatingCache,
    LeftPadding,
    counts_slots,
)
from bone_fx.capture.decoder.pasts import Pasts, SharedPasts
from bone_fx.capture.decoder.rotary.watcher import RotaryWatcher
from bone_fx.capture.decoder.stamping.layers import equal_layers_once
from bone_fx.capture.trace.config_sizes import size_in
from bone_fx.capture.trace.replacements import (
    evaluating,
    forward_replaced,
    graphs_compiled_when_called,
    without_remarks,
)
from bone_fx.errors import BoneFxError, CaptureError

DEFAULT_POSITIONS = 1 << 15
"""Positions of the rotary tables where no configuration limits them."""


@dataclass(frozen=True)
class SessionOptions:
    """What the caller of `capture_decoder` chooses, with the context length of the configuration.

    Attributes:
        context_length: Number of positions; None where nothing limits it.
        unfused: Why attention is written out; None for the operator.
        stamp: Whether equal layers are traced once.
        last_token_logits: Whether the head reads the last token of each text only.
    """

    context_length: int | None
    unfused: str | None
    stamp: bool
    last_token_logits: bool


class Replacement(NamedTuple):
    """A part of the model that is another one while it is traced.

    Attributes:
        part: What is replaced.
        by: What stands in its place.
        why: What it is good for.
        context: Replaces it while open, and puts it back.
    """

    part: str
    by: str
    why: str
    context: AbstractContextManager[object]


class CaptureSession:
    """One trace of a model.

    Args:
        model: The model; it is as it was after `trace`.
        config: The configuration of its text part.
        facts: What is known about it beforehand.
        options: The caller's choices.

    Attributes:
        emitter: What emits attention in the current forward; None before the first.
        last_tokens: Index of each text's last valid token among the new ones, [B]; None before the
            first forward.
        norms: The norms that become operators, by path.
        derived: The constants that come from those, by name.
        rotary: What recognises rotary embeddings, with their tables and its notes.
        plain: Whether any layer's attention is written out.
    """

    def __init__(
        self, model: nn.Module, config: Any, facts: ModelFacts, options: SessionOptions
    ) -> None:
        self.model = model
        self.facts = facts
        self.options = options
        self.dtype = facts.dtype
        self.horizon = options.context_length or size_in(config, "n_positions") or DEFAULT_POSITIONS
        self.unfused = options.unfused or (OWN_ATTENTION if facts.own_attention else None)
        self.plain = self.unfused is not None or any(why_plain(k, v) for _, k, v in facts.shapes)
        self.norms = recognise_norms(model)
        self.derived = derived_constants(model, self.norms)
        self.rotary = RotaryWatcher(model, self.horizon, self.dtype)
        self.emitter: AttentionEmitter | None = None
        self.last_tokens: Tensor | None = None
        self._counts_slots = facts.own_attention and counts_slots(model)
        self._query_heads = int(config.num_attention_heads)
        self._forward = model.forward
        shapes = facts.shapes
        self._inputs = list(dict.fromkeys(shapes)) if options.stamp else list(shapes)
        self._input_of = (
            [self._inputs.index(shape) for shape in shapes]
            if options.stamp
            else list(range(len(shapes)))
        )

    def replacements(self) -> list[Replacement]:
        """All that is different about the model while it is traced, in the order of its making."""
        model, options = self.model, self.options
        table = [
            Replacement("gradients", "none", "a graph for inference", torch.no_grad()),
            Replacement("the mode", "evaluation", "no dropout", evaluating(model)),
            Replacement(
                "norms",
                "one operator each",
                "a norm written out is six nodes",
                norms_as_operators(model, self.norms),
            ),
            Replacement(
                "activations",
                "aten.gelu",
                "a GELU written out is eight nodes",
                gelus_as_operators(model),
            ),
            Replacement(
                "rotary embeddings",
                "tables and RotaryEmbedding",
                "angles are constants",
                self.rotary.watching(),
            ),
            Replacement(
                "mixtures of experts",
                "MoE, or batched products",
                "transformers' own loop over experts depends on the data",
                experts_interface(model, experts_forward),
            ),
        ]
        if not self.facts.own_attention:
            table.append(
                Replacement(
                    "attention and masks",
                    "GroupQueryAttention, or plain operators",
                    "the operator joins past and new tokens in place",
                    attention_interface(model, self._attend, MaskRecogniser(self.horizon)),
                )
            )
        if options.last_token_logits:
            table.append(
                Replacement(
                    "the head",
                    "the head on one row a text",
                    "generation reads no other logits",
                    head_of_last_tokens(model, self._current_last_tokens),
                )
            )
        if options.stamp:
            table.append(
                Replacement(
                    "equal layers",
                    "one node each",
                    "a trace takes as long as its distinct layers",
                    equal_layers_once(self.facts.layers, self._current_emitter, traced=True),
                )
            )
        table.append(
            Replacement(
                "the forward",
                "the inputs and outputs of onnxruntime-genai",
                "a cache is no input of a graph, its tensors are",
                forward_replaced(model, self.forward),
            )
        )
        return table

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """The model with all replacements; each puts back what it replaced, the last one first."""
        with ExitStack() as stack:
            for replacement in self.replacements():
                stack.enter_context(replacement.context)
            yield

    def trace(self) -> ExportedProgram:
        """Traces the model.

        Raises:
            CaptureError: The model cannot be captured, or is not what the facts say.
        """
        mode = detect_fake_mode(list(self.model.parameters()))
        arguments = example_inputs(self._inputs, self.dtype, mode)
        shapes = dynamic_shapes(len(self._inputs), self.horizon, related=self.plain)
        try:
            with self.replaced(), without_remarks(), graphs_compiled_when_called():
                return torch.export.export(
                    self.model, (), arguments, dynamic_shapes=shapes, strict=False
                )
        except Exception as error:  # whatever a model's own code may raise
            if self.emitter is not None and not isinstance(error, BoneFxError):
                self.emitter.cache.refuse_waiting()
            raise not_captured(self.model, error) from error

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Logits and presents, as a graph gives them; stands before the model's own forward."""
        tokens, total = input_ids.shape[1], attention_mask.shape[1]
        if self.plain:
            torch._check(  # type: ignore[no-untyped-call]  # PyTorch has no types for it
                past_key_values[0].shape[2] + tokens == total
            )
        for past in past_key_values:  # layers that are not traced do not say so
            for axis in (0, 2):
                torch._check(  # type: ignore[no-untyped-call]  # PyTorch has no types for it
                    past.shape[axis] == past_key_values[0].shape[axis]
                )
        valid_B = attention_mask.sum(1)
        lengths = ((valid_B - 1).to(torch.int32), total_length(attention_mask))
        new_1 = new_tokens(input_ids)
        before_B = (valid_B - new_1).clamp(min=0)
        positions = torch.arange(tokens)[None, :] + before_B[:, None]
        pairs = list(zip(past_key_values[::2], past_key_values[1::2], strict=True))
        pasts = Pasts(pairs, self._input_of, shared=self.options.stamp)
        layers: list[AttentionLayer] = []
        sizes = {"query_offset": total - tokens, "total": total}
        mask = attention_mask
        if self.facts.own_attention:
            padding = LeftPadding(mask[:, : total - tokens]) if self._counts_slots else None
            cache: PassThroughCache = ConcatenatingCache(
                pasts, heads=self._query_heads, layers=layers, padding=padding, **sizes
            )
            if padding is not None:
                mask = torch.cat((padding.mask_BP, mask[:, total - tokens :]), dim=1)
        else:
            cache = PassThroughCache(pasts, **sizes)
        self.last_tokens = torch.minimum(valid_B, new_1) - 1
        self.emitter = AttentionEmitter(cache, attention_mask, lengths, layers, self.unfused)
        self.rotary.begin(positions, valid_B, (lengths[1], total))
        inputs = model_inputs(self._forward, input_ids, mask, positions, cache)
        output = self._forward(**inputs)
        presents = cache.finish()
        shapes = tuple((a.kv_heads, a.key_size, a.value_size) for a in self.layers)
        if shapes != self.facts.shapes:
            raise CaptureError(
                f"{type(self.model).__name__} changes from run to run: the shapes of its cache",
                expected=f"heads, key and value columns by layer: {self.facts.shapes}",
                found=str(shapes),
            )
        return (output.logits, *(t for pair in presents for t in pair))

    @property
    def layers(self) -> list[AttentionLayer]:
        """What the attention of each layer needs, after a trace."""
        return sorted(self._current_emitter().layers, key=lambda layer: layer.layer)

    def shared_pasts(self) -> SharedPasts | None:
        """How the layers share the inputs of the trace; None if they do not."""
        if not self.options.stamp:
            return None
        return SharedPasts(self._input_of, self._current_emitter().cache.traced())

    def _attend(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self._current_emitter()(*args, **kwargs)

    def _current_emitter(self) -> AttentionEmitter:
        assert self.emitter is not None
        return self.emitter

    def _current_last_tokens(self) -> Tensor:
        assert self.last_tokens is not None
        return self.last_tokens
