"""Arguments of a model's forward that change its outputs and are no inputs of a captured graph.

Which of them matter is found by trying: the model is called with an object in the place of each
that says when anything is done with it. An argument that this model never looks at, such as the
encoder's states where there is no cross-attention, is none.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bone_fx.capture.trace.hf_model import LABEL_NAMES, traceable

_OTHER_FORMS = ("inputs_embeds", "decoder_inputs_embeds", "past_key_values", "encoder_outputs")
"""Other forms in which a caller may give the inputs that a graph has, or that it returned."""
_COUNTED = ("position_ids", "cache_position", "decoder_position_ids")
"""Places of tokens, which a graph counts itself."""
_STATES, _MASK_OF_STATES = "encoder_hidden_states", "encoder_attention_mask"
_TENSOR = re.compile(r"^(?!.*\bint\b).*Tensor")
"""An annotation of a tensor, and not of a number that may also be given as one."""
_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


class _UsedError(Exception):
    """Something was done with an argument."""


class _Argument:
    """Stands for a tensor; raises as soon as it is more than handed on or compared with None."""

    def __init__(self, like: Tensor) -> None:
        self.__dict__["like"] = like

    def __getattr__(self, attribute: str) -> Any:
        raise _UsedError

    def __getitem__(self, key: Any) -> Any:
        raise _UsedError

    def __bool__(self) -> bool:
        raise _UsedError

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        rows = args[1] if function is nn.functional.embedding and len(args) > 1 else None
        if isinstance(rows, Tensor) and rows.shape[0] == 1:  # every value that is allowed is zero
            return rows[0].expand(*args[0].like.shape[:2], -1)
        raise _UsedError


def other_arguments(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensor arguments that change a transformers model's outputs, beside some inputs.

    Args:
        model: The model; its parameters may be fake.
        inputs: One tensor for each input of the graph, by its name.
    """
    names = _tensor_arguments(model, inputs)
    if not names:
        return []
    like = next(iter(inputs.values()))
    mode = torch._guards.detect_fake_mode(list(model.parameters()))
    with traceable(model), torch.no_grad(), mode or nullcontext():
        given = {name: torch.zeros(v.shape, dtype=v.dtype) for name, v in inputs.items()}
        uses = {name: _uses(model, given, {name: _Argument(like)}) for name in names}
        if None in uses.values() and _uses(model, given, {}) is None:
            return names  # the model does not run here, so nothing is known of them
    used = [name for name in names if uses[name]]
    if _STATES in names and _STATES not in used and _MASK_OF_STATES in used:
        used.remove(_MASK_OF_STATES)  # it is prepared, and then masks nothing
    return used


def _uses(model: nn.Module, given: Mapping[str, Tensor], more: Mapping[str, Any]) -> bool | None:
    """Whether a model does anything with an argument; None if it does not run with it."""
    try:
        model(**given, **more)
    except _UsedError:
        return True
    except _ERRORS:
        return None
    return False


def modules_without_use(model: nn.Module, used: Collection[str]) -> list[str]:
    """Names of the outermost modules with parameters of which a graph has none.

    Args:
        model: The model that was captured.
        used: Names of the graph's parameters.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    in_graph = {id(parameters[name]) for name in used if name in parameters}

    def below(module: nn.Module, name: str) -> list[str]:
        own = list(module.parameters())
        if not own or all(id(parameter) in in_graph for parameter in own):
            return []
        if not any(id(parameter) in in_graph for parameter in own):
            return [name]
        children = module.named_children()
        return [found for key, child in children for found in below(child, f"{name}.{key}")]

    return [name.removeprefix(".") for name in below(model, "") if name]


def _tensor_arguments(model: nn.Module, inputs: Collection[str]) -> list[str]:
    """Arguments that are annotated as tensors and are no other form of the inputs."""
    parameters = inspect.signature(model.forward).parameters.values()
    known = {*inputs, *LABEL_NAMES, *_OTHER_FORMS, *_COUNTED}
    if not getattr(model.config, "add_cross_attention", True):
        known |= {_STATES, _MASK_OF_STATES}
    return [
        p.name
        for p in parameters
        if _TENSOR.search(str(p.annotation))
        and p.name not in known
        and not p.name.endswith("labels")
    ]
