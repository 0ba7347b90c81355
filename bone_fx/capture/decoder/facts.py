"""What a trace of a decoder has to know beforehand: about the model, and from the caller."""

from __future__ import annotations

from dataclasses import dataclass

from bone_fx.capture.decoder.experts import FUSED
from bone_fx.capture.decoder.interface import KeyValueShape


@dataclass(frozen=True)
class ModelFacts:
    """What a trace has to know of a model beforehand.

    Attributes:
        shapes: Heads, key columns and value columns of the cache, by layer.
        own_attention: Whether the model attends by itself and does not ask transformers.
        experts: transformers' name of how mixtures of experts are written.
    """

    shapes: tuple[KeyValueShape, ...]
    own_attention: bool = False
    experts: str = FUSED


class OtherFactsError(Exception):
    """A trace contradicts what was assumed about the model.

    Attributes:
        facts: What the trace says.
        what: The fact that is another one, in words.
    """

    def __init__(self, facts: ModelFacts, what: str) -> None:
        super().__init__(what)
        self.facts = facts
        self.what = what


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
