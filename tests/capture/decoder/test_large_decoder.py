"""A 70B model is captured where its weights could not exist."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.memory import PRINT_PEAK

LIMIT = 16 << 30
PROGRAM = f"""
import resource
import torch
from transformers import LlamaConfig, LlamaForCausalLM
resource.setrlimit(resource.RLIMIT_AS, ({LIMIT}, {LIMIT}))
from bone_fx.capture.decoder.capture_decoder import capture_decoder
from bone_fx.base.skeleton import skeleton_from_config
config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                     num_attention_heads=64, num_key_value_heads=8, vocab_size=128256,
                     max_position_embeddings=8192)
model = skeleton_from_config(config, torch.float16, LlamaForCausalLM)
capture = capture_decoder(model)
weights = sum(p.numel() * p.element_size() for p in model.parameters())
attentions = sum("GroupQueryAttention" in str(node.args) for node in capture.program.graph.nodes
                 if "multi_out" in str(node.target))
print(weights, attentions, len(capture.layers))
{PRINT_PEAK}"""


@pytest.mark.slow
def test_70b_is_captured_under_an_address_space_limit() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    weights, attentions, layers, peak = map(int, finished.stdout.split())
    assert weights > 8 * LIMIT
    assert attentions == layers == 80
    assert peak < 3 << 30
