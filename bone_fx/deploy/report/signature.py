"""Inputs and outputs of a graph, as rows of a table with a line for all layers of one kind."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

_LAYER = re.compile(r"(?<=\.)(\d+)(?=\.)")
_MEANINGS = {
    "input_ids": "token ids of the new tokens",
    "attention_mask": "1 for a token, 0 for padding; a decoder's covers past and new tokens",
    "token_type_ids": "0 for the first sentence of a pair, 1 for the second",
    "position_ids": "place of each token, counted from 0",
    "pixel_values": "images as the processor beside the graph makes them",
    "past_key_values.N.key": "keys of the tokens before: empty at first, then `present.N.key`",
    "past_key_values.N.value": "values of the tokens before: empty at first, then "
    "`present.N.value`",
    "present.N.key": "keys of all tokens, for the next step",
    "present.N.value": "values of all tokens, for the next step",
    "logits": "scores before softmax",
    "last_hidden_state": "a vector for each token",
    "pooler_output": "a vector for each text, as the model itself pools it",
}


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: The name, with `N` for the number of a layer.
        kind: Dtype and dimensions, such as `int64[batch_size, sequence_length]`.
        meaning: What it is, in Markdown; empty for names of the user's own.
    """

    name: str
    kind: str
    meaning: str


def signature_rows(values: Mapping[str, str]) -> list[Row]:
    """The rows of inputs or of outputs.

    Args:
        values: Name -> dtype and dimensions, as the manifest has them under `graph`.
    """
    numbers: dict[tuple[str, str], list[str]] = {}
    for name, kind in values.items():
        found = _LAYER.search(name)
        general = _LAYER.sub("N", name, count=1) if found else name
        numbers.setdefault((general, kind), []).extend([found[1]] if found else [])
    rows = []
    for (name, kind), layers in numbers.items():
        meaning = _MEANINGS.get(name, "")
        if layers:
            meaning = "; ".join(filter(None, [meaning, f"N is {_span(layers)}"]))
        rows.append(Row(name, kind, meaning))
    return rows


def _span(layers: list[str]) -> str:
    """Numbers of layers, as a range where they are one."""
    numbers = [int(layer) for layer in layers]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
