"""A module that was captured on one device and runs on another."""

from __future__ import annotations

import copy
from typing import Any

import bone_fx
from tests.capture.architectures import BY_NAME
from tests.elsewhere import call_on_cuda
from tests.end_to_end.test_adapted import CONFIG, inputs, llama, stir


def runs_on_cuda(module: Any) -> bool:
    return {tensor.device.type for tensor in call_on_cuda(module, inputs())} == {"cuda"}


def test_every_form_runs_where_its_inputs_are() -> None:
    adapted = bone_fx.adapt(llama(), CONFIG, inputs()).train()
    stir(adapted, "default")
    assert runs_on_cuda(adapted)
    assert runs_on_cuda(adapted.fold())
    with adapted.disable_adapter():
        assert runs_on_cuda(adapted)
    adapted.layer_modules()
    assert runs_on_cuda(adapted)
    assert runs_on_cuda(copy.deepcopy(adapted).eval())


def test_grouped_heads_run_where_their_inputs_are() -> None:
    row = BY_NAME["qwen2"]
    given = row.inputs(2, 7)
    adapted = bone_fx.adapt(row.build(), CONFIG, given)
    assert "enable_gqa = True" in adapted.code
    assert all(tensor.device.type == "cuda" for tensor in call_on_cuda(adapted, given))
