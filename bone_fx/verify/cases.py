"""What a verification runs, chosen from the model.

A decoder is asked about the lengths its configuration names: windows, chunks, original contexts.
What lies beyond them is computed by other nodes and other rows of tables than a short prompt reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

LONGEST = 2048
"""Tokens of the longest text that is run whole; what lies beyond is met after a made-up past."""

_WORDS = ("window", "chunk", "local_attention")
_ORIGINAL = "original_max_position"


@dataclass(frozen=True)
class Case:
    """Rows of prompts, right-padded to the longest, then decode steps.

    Attributes:
        name: What a person reads.
        lengths: Tokens of each row's prompt.
        steps: Decode steps after it.
        chunks: The prompt goes in pieces of at most this many tokens; None in one.
        buffer: Positions of a cache of fixed size, as CUDA graphs are fed; None for one that grows.
    """

    name: str
    lengths: tuple[int, ...]
    steps: int
    chunks: int | None = None
    buffer: int | None = None

    @property
    def tokens(self) -> int:
        """Positions that the longest row takes."""
        return max(self.lengths) + self.steps


SHORT = (
    Case("batch 1, length 5, past 0 and 2 steps with a past", (5,), 2),
    Case("batch 3, ragged lengths 11, 4 and 7, past 0 and 3 steps with a past", (11, 4, 7), 3),
)
MORE = (
    Case("batch 5, ragged lengths 1 to 7 and a step with a past", (1, 7, 2, 5, 3), 1),
    Case("batch 1, length 64 and 2 steps with a past", (64,), 2),
    Case("batch 1, 14 tokens in pieces of 5, then 2 steps", (14,), 2, chunks=5),
    Case("batch 1, length 6 and 3 steps in a cache of fixed size", (6,), 3, buffer=16),
)


def decoder_cases(config: Any, context_length: int | None, *, short: bool) -> list[Case]:
    """The cases that are run whole: those that a decoder's context holds.

    Around an original context, beyond which all positions are embedded in another way, a row's
    logits depend on the longest row of its batch and on what was cached before: no case crosses it.
    """
    switches = original_contexts(config)
    widest = max((n + 2 for n in switches if n < LONGEST), default=0)
    cases = [
        case if case.buffer is None else replace(case, buffer=max(case.buffer, widest))
        for case in (SHORT if short else (*SHORT, *MORE))
    ]
    return [
        case
        for case in cases
        if max(case.tokens, case.buffer or 0) <= (context_length or sys.maxsize)
        and not any(min(case.lengths) <= at < case.tokens for at in switches)
    ]


def vocabulary_of(model: Any) -> int:
    """How many tokens a transformers model has an embedding for."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:  # transformers' answer for a model of two towers
        return int(model.config.get_text_config().vocab_size)


def edges(config: Any, limit: int | None) -> list[int]:
    """Lengths at which a configuration says that something changes, in order.

    Args:
        config: A transformers configuration.
        limit: The largest of interest.
    """
    return [n for n in _named(config, (*_WORDS, _ORIGINAL)) if n < (limit or sys.maxsize)]


def original_contexts(config: Any) -> list[int]:
    """Lengths beyond which all positions of a text are embedded in another way, in order."""
    return _named(config, (_ORIGINAL,))


def _named(config: Any, words: Sequence[str]) -> list[int]:
    """The integers above 1 whose fields' names hold one of some words, in order."""
    fields = _fields(config.get_text_config().to_dict())
    of_words = [value for name, value in fields if any(word in name for word in words)]
    return sorted({n for n in of_words if isinstance(n, int) and n > 1})


def _fields(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _fields(value, str(key))
    else:
        yield name, content


def rows_of(case: Case, vocab_size: int, seed: int, text: Sequence[int] = ()) -> list[list[int]]:
    """Token ids of each row, prompt and steps: of a text for a case of one row, else random ones.

    The first row of random ones begins with the last token of the vocabulary.
    """
    if len(case.lengths) == 1 and len(text) >= case.tokens > max(SHORT[0].lengths):
        return [list(text[: case.tokens])]
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(0, vocab_size, (length + case.steps,), generator=generator).tolist()
        for length in case.lengths
    ]
    if seed:
        rows[0][0] = vocab_size - 1
    return rows
