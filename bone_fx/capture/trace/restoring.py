"""Leaving a model as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bone_fx.capture.trace.hf_model import configs_of

_OWN_DICTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Restores all attributes, modes, configurations and random states when the block ends.

    Tracing runs the model's own code, which may plant fake tensors in attributes, note things in
    its config (`problem_type`) or draw random numbers; parameters and buffers are the same objects
    afterwards.
    """
    modules = list(model.modules())
    attributes = [dict(module.__dict__) for module in modules]
    owned = [{name: dict(module.__dict__[name]) for name in _OWN_DICTS} for module in modules]
    configs = [(config, dict(config.__dict__)) for config in configs_of(model)]
    python_state = random.getstate()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _numpy_state():
        try:
            yield
        finally:
            random.setstate(python_state)
            for module, before, dicts in zip(modules, attributes, owned, strict=True):
                _restore(module.__dict__, before)
                for name, content in dicts.items():
                    _restore(module.__dict__[name], content)
            for config, content in configs:
                _restore(config.__dict__, content)


@contextmanager
def _numpy_state() -> Iterator[None]:
    """SpecAugment and others draw from numpy's global generator."""
    import numpy as np

    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


def _restore(target: dict[str, Any], before: dict[str, Any]) -> None:
    """Makes `target` equal to `before`, key order included, touching it only where it differs."""
    if list(target) == list(before) and all(target[key] is before[key] for key in before):
        return
    target.clear()
    target.update(before)
