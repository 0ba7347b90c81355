"""What is different about a model while it is traced."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Puts another forward in the place of the model's."""
    previous = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if previous is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = previous


@contextmanager
def configured(model: nn.Module, name: str, value: str) -> Iterator[None]:
    """Sets a field in the configurations of all parts of a model that have it."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    previous = [(config, getattr(config, name)) for config in configs if hasattr(config, name)]
    try:
        for config, _ in previous:
            setattr(config, name, value)
        yield
    finally:
        for config, before in previous:
            setattr(config, name, before)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Keeps what PyTorch logs about a failing trace from the user, who gets a CaptureError."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def graphs_compiled_when_called() -> Iterator[None]:
    """Leaves graphs that `torch.export` makes on its way without Python code until it is asked for.

    It would compile a dozen of them, a tenth of its time, and calls none. Tried with torch 2.13.0,
    whose inductor does the same.
    """
    with _use_lazy_graph_module(should_use=True):
        yield
