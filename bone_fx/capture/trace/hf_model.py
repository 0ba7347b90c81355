"""Everything that touches `transformers.exporters`, which calls itself experimental.

Tried with transformers 5.23.0 and torch 2.13.0; `pyproject.toml` allows others too. What is used of
it: the reversible patches of model code that `torch.export` cannot trace (its registry's "dynamo"),
the pytree registration of caches, and the reset of tensors that modules keep between calls. Its
`prepare_for_export` is not used: it edits the model and the inputs in place and refuses labels,
which are taken out before (`capture.trace.examples`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_transformers_model(model: torch.nn.Module) -> bool:
    """Whether `model` is a `PreTrainedModel`, without importing transformers to find out."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def configs_of(model: torch.nn.Module) -> list[Any]:
    """The distinct configs of a transformers model: encoders and decoders may hold their own."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            configs.setdefault(id(config), config)
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            configs.setdefault(id(text), text)
    return list(configs.values())


@contextmanager
def _without_cache(model: torch.nn.Module) -> Iterator[None]:
    changed = [config for config in configs_of(model) if getattr(config, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextmanager
def without_cache(model: torch.nn.Module) -> Iterator[None]:
    """Runs a transformers model without key/value caches (T5's decoder has its own config)."""
    with _without_cache(model) if is_transformers_model(model) else nullcontext():
        yield


@contextmanager
def traceable(model: torch.nn.Module) -> Iterator[None]:
    """While open, `torch.export` can trace `model`: transformers' own export patches are on."""
    if not is_transformers_model(model):
        yield
        return
    from transformers.exporters.exporter_dynamo import (
        register_cache_pytrees_for_model,
        reset_model_state,
    )

    register_cache_pytrees_for_model(cast("PreTrainedModel", model))
    with _patched(), reset_model_state(model), without_cache(model):
        yield


@contextmanager
def _patched() -> Iterator[None]:
    """What `apply_patches("dynamo")` does, without importing every model that has a patch.

    Only models that are loaded are patched: the others are not what is traced, and importing the
    hundred of them takes longer than the patches.
    """
    from transformers.exporters.utils import _PATCHES, import_dotted_path, patch_attributes

    loaded = [patch for patch in _PATCHES["dynamo"] if _is_loaded(patch[0])]
    patches = [(import_dotted_path(path, missing_ok=True), *rest) for path, *rest in loaded]
    with patch_attributes([patch for patch in patches if patch[0] is not None]):
        yield


def _is_loaded(path: str) -> bool:
    """Whether a dotted path leads into no model's package, or into one that is imported."""
    package, _, inside = path.partition("transformers.models.")
    if package:
        return True
    module = ".".join(inside.split(".")[:2])
    return f"transformers.models.{module}" in sys.modules


LABEL_NAMES = (
    "labels",
    "start_positions",
    "end_positions",
    "next_sentence_label",
    "sentence_order_label",
)
"""Inputs of transformers' heads that only the loss reads: they never enter a graph."""
