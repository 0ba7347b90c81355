"""A forward of exactly the example's inputs, whose signature `torch.export` reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bone_fx.capture.trace.examples import Examples


@contextmanager
def flat_forward(
    model: torch.nn.Module, examples: Examples, finish: Callable[[Any], Any] | None = None
) -> Iterator[None]:
    """A context in which the model takes the inputs by name, and nothing else.

    Args:
        model: The model; its own forward is back when the context ends.
        examples: The inputs, and the constants that go with every call.
        finish: What is done to the model's output, if anything.
    """
    original: Callable[..., Any] = model.forward
    positional = list(examples.positional[: examples.by_position])

    def forward(**inputs: Any) -> Any:
        values = {**inputs, **examples.constants}
        args = [values.pop(name, None) for name in positional]
        output = original(*args, **values)
        return output if finish is None else finish(output)

    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in examples.inputs
        ]
    )
    had = "forward" in model.__dict__
    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        if had:
            model.__dict__["forward"] = original
        else:
            del model.__dict__["forward"]
