"""Captures of transformers models, made once a process for tests of what comes after them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bone_fx.capture.training.capture_training import TrainingCapture, capture_training
from bone_fx.capture.training.loss import loss_for
from bone_fx.capture.training.state import mount_state
from bone_fx.passes.frame import copy_module

_CAPTURES: dict[tuple[object, ...], TrainingCapture] = {}


def capture_once(model: Any, example_inputs: Any, **options: Any) -> TrainingCapture:
    """A capture to train over the weights of the model; one trace a process for equal ones.

    Equal: the class, the configuration, dtypes and devices, what is tied, and the names, shapes and
    dtypes of the example inputs. Other modules and other options are captured each time.
    """
    if not isinstance(model, PreTrainedModel) or any(options.values()):
        return capture_training(model, example_inputs, **options)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    first: dict[int, str] = {}
    state = tuple(
        (name, first.setdefault(id(tensor), name), tensor.dtype, tensor.device, tensor.shape)
        for name, tensor in named
    )
    inputs = tuple(
        (name, value.shape, value.dtype) if isinstance(value, Tensor) else (name, repr(value))
        for name, value in dict(example_inputs).items()
    )
    fields = {**model.config.to_dict(), "_name_or_path": ""}  # which says where it was loaded from
    config = json.dumps(fields, sort_keys=True, default=str)
    key = (type(model), config, model.config._attn_implementation, state, inputs)
    if key not in _CAPTURES:
        _CAPTURES[key] = capture_training(model, example_inputs)
    capture = _CAPTURES[key]
    graph_module = copy_module(capture.graph_module)
    mount_state(graph_module, model)
    graph_module.recompile()
    return replace(capture, graph_module=graph_module, loss=loss_for(model))
