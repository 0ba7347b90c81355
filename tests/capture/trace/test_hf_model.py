"""Which of transformers' patches are applied, and what a capture leaves behind."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen2_vl import modeling_qwen2_vl

from bone_fx.capture.trace.hf_model import traceable
from bone_fx.capture.training.capture_training import capture_training
from tests.end_to_end.test_adapted import llama


def test_models_that_are_loaded_are_patched_and_no_other_is_loaded() -> None:
    before = set(sys.modules)
    attention, forward = functional.scaled_dot_product_attention, modeling_qwen2_vl.VisionAttention
    original = forward.forward
    with traceable(llama()):
        assert functional.scaled_dot_product_attention is not attention
        assert forward.forward is not original
    assert functional.scaled_dot_product_attention is attention
    assert forward.forward is original
    loaded = {name for name in set(sys.modules) - before if ".modeling_" in name}
    assert not loaded


def graphs() -> list[torch.fx.Graph]:
    return [o for o in gc.get_objects() if issubclass(type(o), torch.fx.Graph)]


@pytest.mark.slow
def test_no_graph_of_the_trace_outlives_the_capture() -> None:
    before = graphs()
    capture = capture_training(llama(), {"input_ids": torch.zeros(2, 5, dtype=torch.long)})
    gc.collect()
    known = {id(graph) for graph in before}
    new = [graph for graph in graphs() if id(graph) not in known]
    modules = capture.graph_module.modules()
    own = {id(m.graph) for m in modules if isinstance(m, torch.fx.GraphModule)}
    assert {id(graph) for graph in new} == own
    kept = {key for node in capture.graph_module.graph.nodes for key in node.meta}
    assert kept <= {"val", "nn_module_stack", "stack_trace", "bone_fx"}
