"""What passes through an adapted module to its model, and what does not.

PEFT puts its layers into the model, so whatever the model does it does with adapters. Here the
model stays as it was. What it knows passes through (its configuration, its tags); what would run or
change it does not, because that would silently be without the adapters.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from bone_fx.capture.trace.hf_model import is_transformers_model
from bone_fx.graphs import ParameterHolder
from bone_fx.train.adapter_set import AdapterSet

_PASSED = frozenset(
    {
        *("add_model_tags", "can_generate", "get_correct_attn_implementation"),
        *("get_extended_attention_mask", "invert_attention_mask", "is_backend_compatible"),
        *("is_remote_code", "prepare_inputs_for_generation"),
        "warn_if_padding_and_no_attention_mask",
    }
)
"""Methods of transformers' models that neither run nor change one."""

_ON_PARAMETERS = frozenset(
    {"estimate_tokens", "floating_point_ops", "get_memory_footprint", "num_parameters"}
)
"""Methods of transformers' models that count parameters: those of the adapted module."""

_PARTS = frozenset({"get_input_embeddings", "get_output_embeddings"})

_INSTEAD = {
    "resize_token_embeddings": "resize before adapt()",
    "tie_weights": "tie before adapt()",
    "set_input_embeddings": "set them before adapt()",
    "set_output_embeddings": "set it before adapt()",
    "set_attn_implementation": "set it before adapt(): a graph has the attention of its trace",
}
"""What to do in place of some that would run or change the model."""


class Passing(AdapterSet):
    """An adapter set that knows what its model knows."""

    def __getattr__(self, name: str) -> Any:
        """What the model has and this module has not, where that means the same on both."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            origin = self.__dict__.get("_origin")
            model = None if origin is None else origin.model
            if model is None or name.startswith("_"):
                raise
            return self._passed(model, name)

    def _passed(self, model: nn.Module, name: str) -> Any:
        if name == "device":
            return next(self._base.parameters()).device
        if name == "dtype":
            floats = (p.dtype for p in self._base.parameters() if p.is_floating_point())
            return next(floats, torch.float32)
        value = getattr(model, name)  # an AttributeError of the model is one of this module
        if name in _PARTS:
            return lambda: self._part(value())
        if name in _ON_PARAMETERS and is_transformers_model(model):
            return types.MethodType(getattr(type(model), name), self)
        is_part = isinstance(value, nn.Module | torch.Tensor)
        if is_part or (callable(value) and name not in _PASSED):
            instead = _INSTEAD.get(
                name, "call it on the model, or on what merge_and_unload() gives"
            )
            raise AttributeError(
                f"{name} of {type(model).__name__} does not pass through an adapted module: it "
                f"would be the model's without the adapters; {instead}"
            )
        return value

    def _part(self, module: nn.Module | None) -> nn.Module | None:
        """A module of the model over the parameters that are mounted here; hooks are refused."""
        model: Any = self._origin.model
        path = next((n for n, m in model.named_modules() if m is module), None)
        if module is None or path is None:
            return module
        part = copy.copy(module)
        here = dict(self.get_submodule(path).named_parameters(recurse=False))
        part.__dict__["_parameters"] = {**module._parameters, **here}
        part.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
        for verb in ("register_forward_hook", "register_forward_pre_hook"):
            part.__dict__[verb] = types.MethodType(ParameterHolder._refuse_hook, part)
        return part
