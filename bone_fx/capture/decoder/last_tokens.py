"""Logits of the last token only: the head of a decoder reads one row a text.

Shape letters: B batch, S new tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from bone_fx.capture.decoder.ort_operators import rows_at
from bone_fx.errors import CaptureError


@contextmanager
def head_of_last_tokens(model: nn.Module, last_tokens: Callable[[], Tensor]) -> Iterator[None]:
    """While open, the model's head reads only the last token of each text.

    Args:
        model: A transformers model; the forward of its output embeddings is replaced.
        last_tokens: Gives the index of each row's last valid token among the new ones, int64 [B],
            when the head is called. Padding on the right stands behind it.

    Raises:
        CaptureError: The model does not say which module its head is.
    """
    named = getattr(model, "get_output_embeddings", None)
    head = named() if callable(named) else None
    if not isinstance(head, nn.Module):
        raise CaptureError(
            f"{type(model).__name__} does not say which module makes its logits",
            expected="get_output_embeddings() to return a module",
            next_step="export without last_token_logits",
        )

    def forward(hidden_BSH: Tensor) -> Tensor:
        logits: Tensor = type(head).forward(head, rows_at(hidden_BSH, last_tokens()))
        return logits

    vars(head)["forward"] = forward
    try:
        yield
    finally:
        del vars(head)["forward"]
